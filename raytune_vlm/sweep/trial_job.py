"""A trial on a worker: trained to each rung, saved, scored, reported."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_vlm.errors import CheckpointError
from raytune_vlm.records import (
    Scores,
    TrialFolder,
    TrialRecord,
    read_json_lines,
    write_json,
    write_text,
)
from raytune_vlm.sweep.evaluate_job import evaluate
from raytune_vlm.sweep.jobs import Job

if TYPE_CHECKING:
    from raytune_vlm.sweep.worker import Worker


class TrialJob:
    """A trial on a worker: train to each rung, save, score, report; from wherever it stands."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self.worker, self.job = worker, job
        self.experiment = worker.experiment.with_recipe(job.recipe)
        self.folder: TrialFolder = worker.folder.trial(job.trial_id)
        self.began = time.monotonic()
        self.train_seconds = self.evaluate_seconds = 0.0
        self.best: tuple[float, int] | None = None
        self.notes: list[str] = []
        self.unlogged: list[Any] = []
        """Metrics of the steps since the last line of metrics.jsonl."""
        self.tokens_per_second: float | None = None

    def run(self) -> None:
        """Train and score until the last rung, a stop, or an error; leaves the base as it was."""
        from raytune_vlm.train.run import Run, TrainingData

        worker = self.worker
        data = worker.setup.data
        run = Run(
            worker.base,
            worker.splits["train"],
            self.experiment,
            worker.world,
            TrainingData(data.digest, data.store, worker.setup.index_file, data.tier),
            limit_file=self.folder.micro_batch_file,
        )
        status, failure = "failed", None
        try:
            self._resume(run)
            self._record(run, "running")
            status = "finished" if self._rungs(run) else "stopped"
        except Exception as error:
            failure = str(error)
            raise
        finally:
            try:
                self._record(run, status, failure)
            finally:
                run.close()

    def _resume(self, run: Any) -> None:
        from raytune_vlm.train.checkpoint import newest

        # Rank 0 looks, so that all ranks go on from the same checkpoint.
        folder, damaged = self.worker.world.broadcast(newest(self.folder.checkpoints))
        self.notes += [f"checkpoint passed over: {message}" for message in damaged]
        if folder is not None:
            run.restore(folder)
        if self.worker.world.rank == 0:
            for file in (self.folder.metrics_file, *self.folder.samples.glob("*.jsonl")):
                kept = [row for row in read_json_lines(file) if row["step"] <= run.steps_done]
                write_text(file, "".join(json.dumps(row) + "\n" for row in kept))

    def _rungs(self, run: Any) -> bool:
        """Whether the last rung was reached (False: asked to stop)."""
        for rung in self.experiment.rungs:
            if run.steps_done <= rung and not self._train_to(run, rung):
                return False
            scores = self._scores(run, rung)
            if scores is None:
                return False
            values = {name: entry.value for name, entry in scores.metrics.items()}
            self._note_best(values[self.experiment.metric], rung)
            self._retain()
            last = rung == self.experiment.rungs[-1]
            if last:
                run.audit_end(self.folder.checkpoint(rung))
                self._record(run, "finished")
            if last or rung not in self.job.reported:
                notes = [*self.notes, *run.auditor.notes]
                report = {"step": rung, **values, "done": last, "notes": notes}
                self.worker.report(self.job, report)
                self.notes, run.auditor.notes = [], []
        return True

    def _train_to(self, run: Any, rung: int) -> bool:
        config = self.experiment.train
        began = time.monotonic()
        try:
            while run.steps_done < rung:
                if self.worker.stopped(
                    self.job,
                    trial_id=self.job.trial_id,
                    stage="training",
                    step=run.steps_done,
                    max_steps=config.max_steps,
                    tokens_per_second=self.tokens_per_second,
                ):
                    return False
                metrics = run.step()
                self.unlogged.append(metrics)
                self.tokens_per_second = metrics.tokens_per_second
                if config.log_samples:
                    ids = self.worker.splits["train"].sample_ids
                    row = {"step": metrics.step, "ids": [ids[row] for row in run.delivered]}
                    _append(self.folder.samples / f"rank_{self.worker.world.rank}.jsonl", row)
                if metrics.step % config.log_every == 0 or metrics.step in (1, rung):
                    self._log()
                every = config.checkpoint_every
                if metrics.step < rung and every and metrics.step % every == 0:
                    run.save(self.folder.checkpoint(metrics.step))
        finally:
            self.train_seconds += time.monotonic() - began
        there = (self.folder.checkpoint(rung) / "manifest.json").exists()
        if not self.worker.world.broadcast(there):
            run.save(self.folder.checkpoint(rung))
        return True

    def _scores(self, run: Any, rung: int) -> Scores | None:
        began = time.monotonic()
        found = {entry.step: entry for entry in self.folder.scores("select")}
        known = self.worker.world.broadcast(found)
        try:
            # Scores that an earlier life of this trial has written are not computed again.
            if rung in known:
                return known[rung]
            if run.steps_done != rung:
                raise CheckpointError(f"{self.folder.root}: no scores of step {rung} any more")
            return evaluate(self.worker, self.job, run.model, "select", rung)
        finally:
            self.evaluate_seconds += time.monotonic() - began

    def _note_best(self, value: float, rung: int) -> None:
        sign = 1 if self.experiment.mode == "max" else -1
        if self.best is None or sign * value > self.best[0]:
            self.best = (sign * value, rung)

    def _retain(self) -> None:
        from raytune_vlm.train.checkpoint import retain

        if self.worker.world.rank == 0 and self.best is not None:
            keep = self.experiment.train.keep_checkpoints
            retain(self.folder.checkpoints, keep, {self.best[1]})

    def _log(self) -> None:
        from raytune_vlm.train.step_metrics import merged

        if self.worker.world.rank == 0:
            _append(self.folder.metrics_file, asdict(merged(self.unlogged)))
        self.unlogged = []

    def _record(self, run: Any, status: Any, failure: str | None = None) -> None:
        if self.worker.world.rank != 0:
            return
        record = TrialRecord(
            trial_id=self.job.trial_id,
            number=int(self.job.trial_id.split("/")[0].removeprefix("t")),
            recipe=self.job.recipe,
            status=status,
            step=run.steps_done,
            max_steps=self.experiment.train.max_steps,
            failure=failure,
            seconds=time.monotonic() - self.began,
            train_seconds=self.train_seconds,
            evaluate_seconds=self.evaluate_seconds,
            trainable_parameters=sum(run.trainable.values()),
            trainable_by_scope=run.trainable,
            audit=run.auditor.checks,
            micro_batch=run.batches.lowered_as_json,
        )
        if self.folder.record_file.exists():
            # An earlier life of the trial made the audit of the first step.
            record = replace(record, audit=self.folder.record().audit | record.audit)
        write_json(self.folder.record_file, record)


def _append(file: Path, row: dict[str, Any]) -> None:
    """One more line of a JSON-lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
