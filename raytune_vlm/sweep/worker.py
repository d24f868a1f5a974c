"""A worker of a resident executor: it takes jobs from the board, as many at once as it has slots.

Nothing is started per trial: the base model and the prepared data stay loaded, an adapter is put
on, trained, scored at every rung and taken off again. With several slots, trials take turns on the
base or go through it together (`packed`).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray
import ray.train

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.sweep import MOST_SLOTS
from raytune_vlm.errors import (
    AuditFailed,
    CheckpointError,
    InfrastructureError,
    RaytuneVlmError,
    TrialDiverged,
    TrialInfeasible,
    first_line,
)
from raytune_vlm.records import DataManifest, SweepFolder, write_text
from raytune_vlm.sweep.board import IDLE, Word
from raytune_vlm.sweep.evaluate_job import run_evaluate
from raytune_vlm.sweep.heartbeat import Heartbeat
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.planning import run_plan
from raytune_vlm.sweep.sharing import Sharing, sharing_of
from raytune_vlm.sweep.storage import storage_failure
from raytune_vlm.sweep.trial_job import Answered, TrialJob, Turn

if TYPE_CHECKING:
    from raytune_vlm.collate.features import Features
    from raytune_vlm.models.loading import Base
    from raytune_vlm.sweep.life import Life
    from raytune_vlm.train.objective import Teacher

_T = TypeVar("_T")

FAILURE_KINDS: dict[type[BaseException], str] = {
    TrialDiverged: "diverged",
    TrialInfeasible: "infeasible",
    AuditFailed: "audit",
    CheckpointError: "checkpoint",
}
"""Error -> the kind that the ledger notes; anything else is `error`."""

PUSH_EVERY_S = 0.25
"""How often an executor tells the board where it is and learns whether to stop."""

LOOK_EVERY_S = 1.0
"""How often all ranks look whether a node of theirs is about to go; a collective of Ray Train."""

TAKE_WAIT_S = 20.0
"""How long an idle executor waits at once: the other ranks wait in a collective with a timeout."""


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
    setup: ExecutorSetup = config["setup"]
    rank = ray.train.get_context().get_world_rank()
    timeout, sweep = setup.experiment.train.hang_timeout_s, setup.experiment.name
    try:
        with Heartbeat(setup.board, setup.name, rank, timeout, sweep) as heartbeat:
            Worker(setup, heartbeat).work()
    except Exception as error:
        failure = storage_failure(error, SweepFolder(setup.folder))
        if failure is None:
            raise
        ray.get(setup.board.halt.remote(failure))


class Worker:
    """One worker of an executor: the loaded base model, the data, and the loop over jobs."""

    def __init__(self, setup: ExecutorSetup, heartbeat: Heartbeat) -> None:
        import torch
        import transformers

        from raytune_vlm.collate.pixels import PixelMaker
        from raytune_vlm.models.loading import load_base
        from raytune_vlm.packed.host import Host
        from raytune_vlm.prepare.store import open_split
        from raytune_vlm.train.backends import BACKENDS
        from raytune_vlm.train.world import World

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(setup.experiment.train.cpus_per_worker)))
        self.setup, self.heartbeat = setup, heartbeat
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
        self.features = self._features(self.base)
        self._teacher: Teacher | None = None
        self._lives: dict[str, Life] = {}
        """The trials in training, by their jobs' ids."""
        sweep = self.experiment.sweep
        self.host: Host | None = None
        self._sharing: Sharing | None = None
        if sweep.slots != 1:
            kept = self.folder.packing_file
            self.host = Host(self.base, sweep.packing, self.world, limit_file=kept)
            if self.host.together is not None:
                self._note(f"{self.host.together} slots at once: more did not fit before")
            self._sharing = sharing_of(self, self._note)
        # Where it is to be found out, the board sees to it.
        self._most = MOST_SLOTS if sweep.slots == "auto" else sweep.slots
        self._asked = self._looked = 0.0
        self._pushed: dict[str, float] = {}
        self._words: dict[str, Word] = {}
        """What was told last of each job: go on; drop it; save it, because a person
        paused it, the run ends, or the node is about to go. The same on all ranks."""
        self._leaves = False

    def _features(self, base: Base) -> Features | None:
        """What stands in for a model's pixels, and why nothing does."""
        from raytune_vlm.collate.feature_store import open_store
        from raytune_vlm.collate.features import Features

        train, device = self.experiment.train, self.world.device
        if not train.feature_cache_gb or self.backend.is_sharded(train):
            return None
        shares = 1 if train.distillation.teacher is None else 2
        max_bytes = int(train.feature_cache_gb * 1e9) // shares
        features = Features(base, device, max_bytes, self._note)
        if features.obstacle is not None:
            return None
        if train.feature_disk_gb:
            folder = train.feature_folder(self.setup.data.store)
            max_disk = int(train.feature_disk_gb * 1e9)
            features.disk = open_store(folder, base, device, max_disk, self.note_own)
        return features

    def _write_features(self) -> None:
        """Write those that wait for it: others can use them, and a kill loses none."""
        teacher = self._teacher.features if self._teacher else None
        for features in (self.features, teacher):
            if features is not None and features.disk is not None:
                features.disk.flush()

    def teacher(self, experiment: ExperimentConfig) -> Teacher | None:
        """The teacher of a trial, loaded when the first trial wants one; it stays."""
        from raytune_vlm.models.teacher import load_teacher
        from raytune_vlm.train.objective import Teacher

        if not experiment.train.distillation.is_on:
            return None
        if self._teacher is None:
            base = load_teacher(self.experiment, self.world.device)
            # Augmented images are others in every step.
            keeps = self.experiment.data.augmentation is None
            self._teacher = Teacher(base, self._features(base) if keeps else None)
        return self._teacher

    def work(self) -> None:
        """Do what the board has, until it is closed or a node is about to go."""
        try:
            while (job := self._take()) is not None or self._lives:
                if isinstance(job, Job):
                    self._begin(job)
                else:
                    self._turn()
                if self._leaves and not self._lives:
                    return
        finally:
            for life in self._lives.values():  # an error that is no trial's goes through here
                life.drop()
            self._write_features()

    def _take(self) -> Job | str | None:
        """The next job for all ranks, if there is a slot for it; waits only where all are free."""
        if self._leaves or len(self._lives) >= self._most:
            return IDLE
        now, job = time.monotonic(), IDLE
        # Rank 0 alone looks at its clock: two clocks could say different things.
        if self.world.rank == 0 and not (self._lives and now - self._asked < PUSH_EVERY_S):
            limit = self.experiment.train.hang_timeout_s
            wait_s = 0.0 if self._lives else min(TAKE_WAIT_S, limit)
            take = self.setup.board.take
            job = ray.get(take.remote(self.setup.name, wait_s, list(self._lives)))
            self._asked = now if job == IDLE else 0.0
        found: Job | str | None = self.world.broadcast(job)
        return found

    def _begin(self, job: Job) -> None:
        """Score what is to be scored; bring a trial to its first step."""
        self._words[job.job_id], self._pushed[job.job_id] = "", 0.0
        together = ", ".join([*self._lives, job.job_id])
        self.heartbeat.watch(self.folder.trial(job.trial_id).root, together)
        life = self._part(job, lambda: self._first(job))
        if life is None:
            self._end(job)
        else:
            self._lives[job.job_id] = life

    def _first(self, job: Job) -> Life | None:
        from raytune_vlm.models.lora import unmixable
        from raytune_vlm.sweep.life import Life

        if job.kind == "evaluate":
            run_evaluate(self, job)
            return None
        if job.kind == "plan":
            run_plan(self, job)
            return None
        turns = TrialJob(self, job).turns()
        pause = next(turns, None)
        if pause is None:
            return None
        if self.host and self.experiment.sweep.packing == "fast":
            obstacle = self.host.obstacle(pause.run)
            if obstacle is not None:
                apart = obstacle == unmixable(pause.run.experiment.lora)
                what = "steps and is scored" if apart else "steps"
                self._note(f"{job.job_id} {what} by itself: {obstacle}")
        return Life(job, turns, pause, self.world.device, parked=self.host is not None)

    def _turn(self) -> None:
        """Score the trials at a rung; one step of every trial, and what follows from it."""
        from raytune_vlm.packed.host import step_alone

        self._score()
        lives = [life for life in self._lives.values() if life.rung is None]
        if not lives:
            return
        began = time.monotonic()
        if self.host is None:
            outcomes = [step_alone(life.run) for life in lives]
            seconds = [time.monotonic() - began]
        else:
            try:
                outcomes = self.host.step([life.slot for life in lives if life.slot is not None])
            except Exception as error:  # perhaps of this rank alone; see `_part`
                if failure := storage_failure(error, self.folder):
                    ray.get(self.setup.board.halt.remote(failure))
                raise
            for note in self.host.notes:
                self._note(note)
            self.host.notes, seconds = [], self.host.seconds
        if self._sharing:
            self._sharing.step_s = time.monotonic() - began
        for life, outcome, own in zip(lives, outcomes, seconds, strict=True):
            self._go_on(life, Turn(outcome, own))

    def _score(self) -> None:
        """Score the trials at a rung, their prompts in shared batches where that can be."""
        due = [life for life in self._lives.values() if life.rung is not None]
        answered: dict[str, Answered] = {}
        began = time.monotonic()
        if due and self._sharing:
            due = self._sharing.ready(due, [x for x in self._lives.values() if x.rung is None])
            answered = self._sharing.answer(due)
        for life in due:
            self._go_on(life, answered.get(life.job.job_id, Answered()))
        if due and self._sharing:
            self._sharing.score_s = (time.monotonic() - began) / len(due)

    def _go_on(self, life: Life, after: Turn | Answered) -> None:
        """What follows what a trial waited for."""
        if not self._part(life.job, partial(life.go_on, after)):
            del self._lives[life.job.job_id]
            self._end(life.job)

    def _end(self, job: Job) -> None:
        """The job is over here, whatever came of it."""
        board, name = self.setup.board, self.setup.name
        word = self._words.pop(job.job_id)
        if not self._lives:
            self._write_features()
            self.heartbeat.rest()
        self.heartbeat.gauges.drop(job.trial_id)
        if self.world.rank != 0:
            return
        if word == "leave":
            message = f"a node is about to go; {job.job_id} goes on elsewhere"
            ray.get(board.hand_back.remote(name, job.job_id, message))
        elif word == "alone":
            message = f"{job.job_id} ran out of memory beside others: it goes on by itself"
            ray.get(board.hand_back.remote(name, job.job_id, message, alone=True))
        else:
            ray.get(board.finish.remote(name, job.job_id))

    def _part(self, job: Job, do: Callable[[], _T]) -> _T | None:
        """Do a part of a job; None where it failed, which is reported.

        Raises
        ------
        Exception
            What the recipe is not to blame for, or perhaps one rank alone has met: Ray Train
            restarts the workers, and the board counts the attempt.
        """
        from raytune_vlm.train.memory import lacks_memory

        try:
            return do()
        except Exception as error:
            failure = storage_failure(error, self.folder)
            if failure is not None:
                # Every other trial would fail of it too: the run ends, this one stays as it is.
                ray.get(self.setup.board.halt.remote(failure))
                return None
            kind = FAILURE_KINDS.get(type(error), "error")
            if isinstance(error, InfrastructureError):
                raise
            if self.world.size > 1 and kind in ("infeasible", "error"):
                raise  # the other ranks would wait for this one in a collective
            if lacks_memory(error) and self._lives.keys() - {job.job_id}:
                self._words[job.job_id] = "alone"
                return None
            trial = self.folder.trial(job.trial_id)
            if self.world.rank == 0 and not isinstance(error, RaytuneVlmError):
                write_text(trial.root / "error.txt", "".join(traceback.format_exception(error)))
            self.report(job, {"failed": kind, "message": first_line(error), "done": True})
            self._words[job.job_id] = "stop"  # also where its node is about to go
            return None

    def report(self, job: Job, report: dict[str, Any]) -> None:
        """Hand a result of a job to whoever waits for it."""
        if self.world.rank == 0:
            ray.get(self.setup.board.report.remote(job.job_id, report))

    def _note(self, message: str) -> None:
        """Something that a person should read, though no trial's; said once, by rank 0."""
        if self.world.rank == 0:
            ray.get(self.setup.board.note.remote(f"{self.setup.name}: {message}"))

    def note_own(self, message: str) -> None:
        """Something of this worker alone: its node's disk is not that of rank 0."""
        who = f"{self.setup.name}, worker {self.world.rank}"
        ray.get(self.setup.board.note.remote(f"{who}: {message}"))

    def beat(self) -> Literal[True]:
        """A sign that this worker has come on."""
        self.heartbeat.beat()
        return True

    def told(self, job: Job, **progress: Any) -> Word:
        """Push a job's progress now and then; what to do with it, the same on all ranks."""
        self.beat()
        now, look, word = time.monotonic(), False, self._words[job.job_id]
        if self.world.rank == 0:
            if now - self._pushed[job.job_id] >= PUSH_EVERY_S:
                push = self.setup.board.push
                word = ray.get(push.remote(self.setup.name, job.job_id, progress))
                self._pushed[job.job_id] = now
            look = now - self._looked >= LOOK_EVERY_S
        word, look = self.world.broadcast((word, look))
        if look:
            self._looked = now
            self._leaves = self._leaves or ray.train.get_preemption_info() is not None
        if self._leaves:
            word = word or "leave"
        self._words[job.job_id] = word
        return word
