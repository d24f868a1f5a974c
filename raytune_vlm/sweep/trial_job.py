"""A trial on a worker: trained to each rung, saved, scored, reported.

It is a generator, so that a worker can have several in training: whoever drives it does the steps,
and may have prompts of several answered in one before they are scored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_vlm.errors import CheckpointError, StorageFull
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
    from raytune_vlm.collate.features import Features
    from raytune_vlm.packed.host import Outcome
    from raytune_vlm.sweep.worker import Worker
    from raytune_vlm.train.run import Run
    from raytune_vlm.train.step_metrics import StepMetrics


@dataclass(frozen=True)
class Turn:
    """What came of a step."""

    outcome: Outcome
    seconds: float
    """The trial's share of the time that it took."""


@dataclass(frozen=True)
class Answered:
    """Seconds of a trial's share of what was answered together with others, before it is scored."""

    plain: float = 0.0
    """Of the prompts as they are."""
    altered: float = 0.0
    """Of those of controls."""


@dataclass(frozen=True)
class Pause:
    """Where a trial waits for whoever drives it."""

    run: Run
    rung: int | None
    """It is to be scored at this step; None: a step is due."""


class TrialJob:
    """A trial on a worker: train to each rung, save, score, report; from wherever it stands."""

    def __init__(self, worker: Worker, job: Job) -> None:
        from raytune_vlm.train.retention import Retention

        self.worker, self.job = worker, job
        self.experiment = worker.experiment.with_recipe(job.recipe)
        self.folder: TrialFolder = worker.folder.trial(job.trial_id)
        self.began = time.monotonic()
        self.train_seconds = self.evaluate_seconds = 0.0
        # A trial that was paused, or whose worker died, has had time before.
        self.earlier = self.folder.record() if self.folder.record_file.exists() else None
        self.scored: dict[int, float] = {}
        """Step -> the score that decides, of every rung that was scored in any life."""
        config = self.experiment.train
        maximise = self.experiment.mode == "max"
        self.retention = Retention(config.keep_checkpoints, config.keep_best, maximise)
        self.notes: list[str] = []
        self.unlogged: list[StepMetrics] = []
        """Metrics of the steps since the last line of metrics.jsonl."""
        self.tokens_per_second: float | None = None

    def turns(self) -> Generator[Pause, Turn | Answered, None]:
        """Train and score until the job's last rung, a stop, or an error; leaves the base as it
        was.

        Yields wherever a step is due, and is sent the `Turn` that came of it; and before it is
        scored, to be sent an `Answered`. The adapter is on the base whenever this goes on.
        """
        from raytune_vlm.train.run import Run, TrainingData

        worker = self.worker
        data = worker.setup.data
        _forget_peak_memory()
        run = Run(
            worker.base,
            worker.splits["train"],
            self.experiment,
            worker.world,
            TrainingData(data.digest, data.store, worker.setup.index_file, data.tier),
            limit_file=self.folder.micro_batch_file,
            features=self._features(),
            teacher=worker.teacher(self.experiment),
        )
        status, failure = "stopped", None
        try:
            self._resume(run)
            self._record(run, "running")
            status = "finished" if (yield from self._rungs(run)) else "stopped"
        except Exception as error:
            status, failure = "failed", str(error)
            raise
        finally:
            try:
                self._record(run, status, failure)
            finally:
                run.close()

    def _features(self) -> Features | None:
        """What stands in for pixels while this trial trains; a note where that is not possible."""
        features, lora = self.worker.features, self.experiment.lora
        if features is None:
            return None
        if self.experiment.data.augmentation is not None:
            self.notes.append("images are encoded in every step: data.augmentation changes them")
            return None
        if not lora.leaves_towers:
            trained = "+".join((*lora.scopes, *lora.full_scopes))
            self.notes.append(f"images are encoded in every pass: {trained} is trained")
        return features

    def _resume(self, run: Run) -> None:
        from raytune_vlm.train.checkpoint import clear_leftovers, newest

        if self.worker.world.rank == 0:
            clear_leftovers(self.folder.checkpoints)
        # Rank 0 looks, so that all ranks go on from the same checkpoint.
        folder, damaged = self.worker.world.broadcast(newest(self.folder.checkpoints))
        self.notes += [f"checkpoint passed over: {message}" for message in damaged]
        if folder is not None:
            run.restore(folder)
        elif self.job.origin is not None:
            self._start_as_clone(run, self.job.origin)
        for entry in self.folder.scores("select"):
            self.scored[entry.step] = entry.metrics[self.experiment.metric].value
        if self.worker.world.rank == 0:
            for file in (self.folder.metrics_file, *self.folder.samples.glob("*.jsonl")):
                kept = [row for row in read_json_lines(file) if row["step"] <= run.steps_done]
                write_text(file, "".join(json.dumps(row) + "\n" for row in kept))

    def _start_as_clone(self, run: Run, origin: dict[str, Any]) -> None:
        if not self.folder.origin.exists():
            raise CheckpointError(
                f"{self.folder.checkpoint(origin['step'])}, which {origin['parent']} left, is not "
                "whole"
            )
        before = self.worker.experiment.with_recipe(origin["recipe"])
        told = run.start_from(self.folder.origin, before, origin["step"])
        start = f"starts from {origin['parent']} at step {origin['step']}"
        note = "; ".join([start, *told, "optimizer state is fresh"])
        # At once: its next life, which goes on from a checkpoint, would not say it.
        self.worker.report(self.job, {"notes": [note], "done": False})

    def _rungs(self, run: Run) -> Generator[Pause, Turn | Answered, bool]:
        """Whether the last rung was reached (False: asked to stop, or paused)."""
        for rung in self.experiment.rungs:
            if self.job.origin is not None and rung <= self.job.origin["step"]:
                continue
            if run.steps_done <= rung and not (yield from self._train_to(run, rung)):
                return False
            scores = yield from self._scores(run, rung)
            if scores is None:
                return False
            values = {name: entry.value for name, entry in scores.metrics.items()}
            self.scored[rung] = values[self.experiment.metric]
            self._retain()
            last = rung == self.experiment.rungs[-1]
            if last:
                run.audit_end(self.folder.checkpoint(rung))
                self._record(run, "finished")
            if last or rung not in self.job.reported:
                notes = [*self.notes, *run.auditor.notes]
                costs = self._costs(run)
                report = {"step": rung, **values, "done": last, "notes": notes, "costs": costs}
                if rung == self.job.until and not last:
                    self._record(run, "stopped")  # unless it is promoted
                self.worker.report(self.job, report)
                self.notes, run.auditor.notes = [], []
            if rung == self.job.until and not last:
                return False
        return True

    def _train_to(self, run: Run, rung: int) -> Generator[Pause, Turn | Answered, bool]:
        while run.steps_done < rung:
            if word := self.worker.told(
                self.job,
                trial_id=self.job.trial_id,
                stage="training",
                step=run.steps_done,
                max_steps=self.experiment.train.max_steps,
                tokens_per_second=self.tokens_per_second,
            ):
                # The run or its node ends, not the trial: no step is lost.
                ends = word != "stop" and run.steps_done > 0
                if ends and not self._is_saved(run.steps_done):
                    self._save(run)
                return False
            turn = yield Pause(run, None)
            assert isinstance(turn, Turn)
            self.train_seconds += turn.seconds
            if isinstance(turn.outcome, Exception):
                raise turn.outcome
            self._stepped(run, turn.outcome, rung)
        if not self._is_saved(rung):
            self._save(run)
        return True

    def _stepped(self, run: Run, metrics: StepMetrics, rung: int) -> None:
        """Log a step, and save where that is due."""
        config = self.experiment.train
        self.unlogged.append(metrics)
        self.tokens_per_second = metrics.tokens_per_second
        if config.log_samples:
            ids = self.worker.splits["train"].sample_ids
            row = {"step": metrics.step, "ids": [ids[row] for row in run.delivered]}
            _append(self.folder.samples / f"rank_{self.worker.world.rank}.jsonl", row)
        if metrics.step % config.log_every == 0 or metrics.step in (1, rung):
            self._log()
        if metrics.step < rung and self._is_regular(metrics.step):
            self._save(run)
            self._retain()

    def _is_saved(self, step: int) -> bool:
        """Whether there is a whole checkpoint of this step; a damaged one is written again."""
        from raytune_vlm.train.checkpoint import verify

        there = True
        try:
            verify(self.folder.checkpoint(step))
        except CheckpointError:
            there = False
        return bool(self.worker.world.broadcast(there))

    def _is_regular(self, step: int) -> bool:
        """Whether a checkpoint of this step is due: not one saved because something ended."""
        every = self.experiment.train.checkpoint_every
        return step in self.experiment.rungs or bool(every and step % every == 0)

    def _save(self, run: Run) -> None:
        """A checkpoint of where the run stands, if there is room for it."""
        from raytune_vlm.train.retention import make_room, needed_bytes

        began = time.monotonic()
        folder, failure = self.folder.checkpoints, None
        if self.worker.world.rank == 0:
            try:
                needed = needed_bytes(run.model, folder)
                make_room(folder, needed, self.retention.pinned(self._comparable()))
            except StorageFull as error:
                failure = error
        failure = self.worker.world.broadcast(failure)
        if failure is not None:
            raise failure
        run.save(self.folder.checkpoint(run.steps_done))
        self.train_seconds += time.monotonic() - began

    def _scores(self, run: Run, rung: int) -> Generator[Pause, Turn | Answered, Scores | None]:
        """The scores of a rung; None if stopped half-way."""
        found = {entry.step: entry for entry in self.folder.scores("select")}
        known = self.worker.world.broadcast(found)
        # Scores that an earlier life of this trial has written are not computed again.
        if rung in known:
            return known[rung]
        if run.steps_done != rung:
            raise CheckpointError(f"{self.folder.root}: no scores of step {rung} any more")
        answered = yield Pause(run, rung)
        assert isinstance(answered, Answered)
        self.evaluate_seconds += answered.plain + answered.altered
        began = time.monotonic()
        try:
            return evaluate(
                self.worker, self.job, run.model, "select", rung, seconds=answered.plain
            )
        finally:
            self.evaluate_seconds += time.monotonic() - began

    def _comparable(self) -> dict[int, float]:
        """The scores on the largest part of `select`: only equal parts can be compared."""
        shares = {step: self.experiment.select_share(step) for step in self.scored}
        most = max(shares.values(), default=1.0)
        return {step: value for step, value in self.scored.items() if shares[step] == most}

    def _costs(self, run: Run) -> dict[str, float]:
        """What the trial has cost by now; see `config.objectives.COSTS`."""
        costs = {
            "trainable_parameters": float(sum(run.trainable.values())),
            "train_seconds": self.train_seconds,
        }
        if peak := self._peak_memory_gb():
            costs["peak_memory_gb"] = peak
        return costs

    def _peak_memory_gb(self) -> float:
        """0 with several slots: what neighbours took cannot be told from what this trial took."""
        return 0.0 if self.worker.host is not None else _peak_memory_gb()

    def _retain(self) -> None:
        if self.worker.world.rank == 0:
            self.retention.apply(self.folder.checkpoints, self._comparable(), self._is_regular)

    def _log(self) -> None:
        from raytune_vlm.train.step_metrics import merged

        if self.worker.world.rank == 0:
            metrics = merged(self.unlogged)
            _append(self.folder.metrics_file, asdict(metrics))
            self.worker.heartbeat.gauges.set(self.job.trial_id, metrics)
        self.unlogged = []

    def _record(self, run: Run, status: Any, failure: str | None = None) -> None:
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
            peak_memory_gb=self._peak_memory_gb(),
            audit=run.auditor.checks,
            micro_batch=run.batches.lowered_as_json,
            origin=self.job.origin,
        )
        if self.earlier is not None:
            record = replace(
                record,
                seconds=self.earlier.seconds + record.seconds,
                train_seconds=self.earlier.train_seconds + record.train_seconds,
                evaluate_seconds=self.earlier.evaluate_seconds + record.evaluate_seconds,
                # An earlier life of the trial made the audit of the first step.
                audit=self.earlier.audit | record.audit,
            )
        if self.folder.record_file.exists():
            record = replace(record, notes=self.folder.record().notes)
        write_json(self.folder.record_file, record)


def _append(file: Path, row: dict[str, Any]) -> None:
    """One more line of a JSON-lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _forget_peak_memory() -> None:
    """Let the peak of this trial be measured, not that of the ones before."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory_gb() -> float:
    """Most memory of the GPU that tensors took, in 10^9 bytes; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
