"""A worker of a resident executor: it takes jobs from the board, one by one.

Nothing is started per trial: the base model and the prepared data stay loaded, an adapter is put
on, trained, scored at every rung and taken off again.
"""

from __future__ import annotations

import json
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import (
    AuditFailed,
    CheckpointError,
    InfrastructureError,
    RaytuneVlmError,
    TrialDiverged,
    TrialInfeasible,
)
from raytune_vlm.records import (
    BASE_TRIAL,
    DataManifest,
    Scores,
    SweepFolder,
    TrialFolder,
    TrialRecord,
    read_json_lines,
    write_json,
    write_text,
)
from raytune_vlm.sweep.jobs import Job

FAILURE_KINDS: dict[type[BaseException], str] = {
    TrialDiverged: "diverged",
    TrialInfeasible: "infeasible",
    AuditFailed: "audit",
    CheckpointError: "checkpoint",
}
"""Error -> the kind that the ledger notes; anything else is `error`."""

PUSH_EVERY_S = 0.25
"""How often an executor tells the board where it is and learns whether to stop."""


@dataclass(frozen=True)
class ExecutorSetup:
    """What an executor's workers need to begin; plain data and a Ray handle."""

    name: str
    experiment: ExperimentConfig
    folder: str
    data: DataManifest
    index_file: str
    board: Any
    scratch: str
    """Where Ray Train keeps its own state; nothing of it outlives the session."""


def executor_loop(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`: take jobs until the board is closed."""
    Worker(config["setup"]).work()


class Worker:
    """One worker of an executor: the loaded base model, the data, and the loop over jobs."""

    def __init__(self, setup: ExecutorSetup) -> None:
        import torch
        import transformers

        from raytune_vlm.collate.pixels import PixelMaker
        from raytune_vlm.models.loading import load_base
        from raytune_vlm.prepare.store import open_split
        from raytune_vlm.train.backends import BACKENDS
        from raytune_vlm.train.world import World

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(setup.experiment.train.cpus_per_worker)))
        self.setup = setup
        self.experiment = setup.experiment
        self.folder = SweepFolder(setup.folder)
        self.world = World.current()
        train = self.experiment.train
        self.backend = BACKENDS[train.backend]
        # What is cut up need not fit on a device as a whole.
        sharded = self.backend.is_sharded(train)
        self.base = load_base(setup.experiment.model, "cpu" if sharded else self.world.device)
        self.backend.place(self.base, self.world, train)
        maker = PixelMaker(
            self.base.processor.image_processor,
            self.base.family,
            self.base.image_backend,
            self.experiment.data.image_limits,
        )
        self.splits = {
            name: open_split(setup.data.store, setup.index_file, name, maker.decode)
            for name in ("train", "select", "report")
        }
        limits = {
            "select": self.experiment.data.max_select_samples,
            "report": self.experiment.data.max_report_samples,
        }
        self.rows = {name: self.splits[name].fixed_choice(limit) for name, limit in limits.items()}
        self._pushed = 0.0
        self._stop = False

    def work(self) -> None:
        """Rank 0 takes jobs for all ranks."""
        while True:
            job = None
            if self.world.rank == 0:
                job = ray.get(self.setup.board.take.remote(self.setup.name))
            job = self.world.broadcast(job)
            if job is None:
                return
            self._stop, self._pushed = False, 0.0
            self._do(job)
            if self.world.rank == 0:
                ray.get(self.setup.board.finish.remote(self.setup.name, job.job_id))

    def _do(self, job: Job) -> None:
        try:
            if job.kind == "trial":
                TrialJob(self, job).run()
            else:
                self._evaluate_job(job)
        except Exception as error:
            kind = FAILURE_KINDS.get(type(error), "error")
            if isinstance(error, InfrastructureError):
                raise  # the recipe is not to blame: Ray Train restarts, the board counts
            if self.world.size > 1 and kind in ("infeasible", "error"):
                # Perhaps on this rank alone: the others would wait for it in a collective. Ray
                # Train restarts the group, and the board counts the attempt.
                raise
            trial = self.folder.trial(job.trial_id)
            if self.world.rank == 0 and not isinstance(error, RaytuneVlmError):
                write_text(trial.root / "error.txt", traceback.format_exc())
            message = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            self.report(job, {"failed": kind, "message": message, "done": True})

    def report(self, job: Job, report: dict[str, Any]) -> None:
        """Hand a result of a job to whoever waits for it."""
        if self.world.rank == 0:
            ray.get(self.setup.board.report.remote(job.job_id, report))

    def stopped(self, job: Job, **progress: Any) -> bool:
        """Push progress now and then; whether the job shall stop, the same answer on all ranks."""
        now = time.monotonic()
        if self.world.rank == 0 and now - self._pushed >= PUSH_EVERY_S:
            push = self.setup.board.push
            self._stop = ray.get(push.remote(self.setup.name, job.job_id, progress))
            self._pushed = now
        self._stop = bool(self.world.broadcast(self._stop))
        return self._stop

    def evaluate(self, job: Job, model: Any, split: str, step: int) -> Scores | None:
        """Generate, score and store one checkpoint on one split; None if stopped half-way."""
        from raytune_vlm.evaluate.generate import Together, generate
        from raytune_vlm.evaluate.scoring import score, write_evaluation
        from raytune_vlm.prepare.blank import blank_sample

        began = time.monotonic()
        rows = self.rows[split]
        mine = rows[self.world.rank :: self.world.size]
        together = None
        if self.world.size > 1 and self.backend.is_sharded(self.experiment.train):
            mine = mine or rows[:1]
            blank = blank_sample(self.base, self.splits[split])
            together = Together(lambda count: max(self.world.gather(count)), blank)
        found = generate(
            model,
            self.base,
            self.splits[split],
            mine,
            self.experiment.evaluation,
            device=self.world.device,
            keep_going=lambda: (
                self.world.size > 1
                or not self.stopped(job, trial_id=job.trial_id, stage=f"scoring {split}", step=step)
            ),
            together=together,
        )
        if found is None:
            return None
        by_id = {entry.sample_id: entry for part in self.world.gather(found) for entry in part}
        gathered = [by_id[self.splits[split].sample_ids[row]] for row in rows]
        evaluation = self.experiment.evaluation
        scores, table = score(
            gathered,
            trial_id=job.trial_id,
            step=step,
            split=split,
            metrics=evaluation.metrics,
            answer=evaluation.answer,
            confidence=evaluation.confidence,
            num_bootstrap=evaluation.num_bootstrap,
            seed=self.experiment.seed,
            seconds=time.monotonic() - began,
        )
        if self.world.rank == 0:
            folder = self.folder.trial(job.trial_id).evaluation(split, step)
            write_evaluation(folder, scores, table)
        return scores

    def _evaluate_job(self, job: Job) -> None:
        from raytune_vlm.models.adapter_file import load_adapter
        from raytune_vlm.models.lora import attach, detach
        from raytune_vlm.train.checkpoint import verify

        if job.trial_id == BASE_TRIAL:
            scores = self.evaluate(job, self.base.model, job.split, 0)
        else:
            recipe = self.experiment.with_recipe(job.recipe)
            source = self.folder.trial(job.trial_id).checkpoint(job.step)
            verify(source)
            with self.backend.whole(self.base) if recipe.lora.reads_weights else nullcontext():
                model = attach(self.base.model, self.base.family, recipe.lora, seed=recipe.seed)
            try:
                load_adapter(source, model)
                scores = self.evaluate(job, model, job.split, job.step)
            finally:
                self.base.model = detach(model)
        if scores is not None:
            values = {name: entry.value for name, entry in scores.metrics.items()}
            self.report(job, {"step": job.step, **values, "done": True})


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
                ):
                    return False
                metrics = run.step()
                if config.log_samples:
                    ids = self.worker.splits["train"].sample_ids
                    row = {"step": metrics.step, "ids": [ids[row] for row in run.delivered]}
                    _append(self.folder.samples / f"rank_{self.worker.world.rank}.jsonl", row)
                if metrics.step % config.log_every == 0 or metrics.step in (1, rung):
                    self._log(metrics)
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
            return self.worker.evaluate(self.job, run.model, "select", rung)
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

    def _log(self, metrics: Any) -> None:
        if self.worker.world.rank == 0:
            _append(self.folder.metrics_file, asdict(metrics))

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
