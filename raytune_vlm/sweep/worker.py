"""A worker of a resident executor: it takes jobs from the board, one by one.

Nothing is started per trial: the base model and the prepared data stay loaded, an adapter is put
on, trained, scored at every rung and taken off again.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from typing import Any, Literal

import ray
import ray.train

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import (
    AuditFailed,
    CheckpointError,
    InfrastructureError,
    RaytuneVlmError,
    StorageFull,
    TrialDiverged,
    TrialInfeasible,
)
from raytune_vlm.records import DataManifest, SweepFolder, write_text
from raytune_vlm.sweep.board import IDLE
from raytune_vlm.sweep.evaluate_job import run_evaluate
from raytune_vlm.sweep.heartbeat import Heartbeat
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.trial_job import TrialJob

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
    with Heartbeat(setup.board, setup.name, rank, timeout, sweep) as heartbeat:
        Worker(setup, heartbeat).work()


class Worker:
    """One worker of an executor: the loaded base model, the data, and the loop over jobs."""

    def __init__(self, setup: ExecutorSetup, heartbeat: Heartbeat) -> None:
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
        self._pushed = self._looked = 0.0
        self.word: Literal["", "stop", "close", "leave"] = ""
        """What this worker was told last: go on; drop the job; the run ends; the node is about to
        go. The same on all ranks."""

    def work(self) -> None:
        """Rank 0 takes jobs for all ranks, until there are no more or a node is about to go."""
        board, name = self.setup.board, self.setup.name
        wait_s = min(TAKE_WAIT_S, self.experiment.train.hang_timeout_s)
        while True:
            job = None
            if self.world.rank == 0:
                job = ray.get(board.take.remote(name, wait_s))
            job = self.world.broadcast(job)
            if job is None:
                return
            if job == IDLE:
                continue
            self.word, self._pushed = "", 0.0
            self.heartbeat.watch(self.folder.trial(job.trial_id).root, job.job_id)
            self._do(job)
            self.heartbeat.rest()
            leaves = self._leaves
            if self.world.rank == 0 and leaves:
                message = f"a node is about to go; {job.job_id} goes on elsewhere"
                ray.get(board.hand_back.remote(name, message))
            elif self.world.rank == 0:
                ray.get(board.finish.remote(name, job.job_id))
            if leaves:
                return

    @property
    def _leaves(self) -> bool:
        return self.word == "leave"

    def _do(self, job: Job) -> None:
        try:
            if job.kind == "trial":
                TrialJob(self, job).run()
            else:
                run_evaluate(self, job)
        except Exception as error:
            if isinstance(error, StorageFull) or getattr(error, "errno", None) in (ENOSPC, EDQUOT):
                # Every other trial would fail of it too: the run ends, this one stays as it is.
                ray.get(self.setup.board.halt.remote(str(error)))
                return
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
            self.word = "stop"  # also where its node is about to go: it is done with

    def report(self, job: Job, report: dict[str, Any]) -> None:
        """Hand a result of a job to whoever waits for it."""
        if self.world.rank == 0:
            ray.get(self.setup.board.report.remote(job.job_id, report))

    def beat(self) -> Literal[True]:
        """A sign that this worker has come on."""
        self.heartbeat.beat()
        return True

    def stopped(self, job: Job, **progress: Any) -> bool:
        """Push progress now and then; whether to leave the job, the same answer on all ranks.

        `word` then says why.
        """
        self.beat()
        now, look = time.monotonic(), False
        if self.world.rank == 0:
            if now - self._pushed >= PUSH_EVERY_S:
                push = self.setup.board.push
                self.word = ray.get(push.remote(self.setup.name, job.job_id, progress))
                self._pushed = now
            look = now - self._looked >= LOOK_EVERY_S
        self.word, look = self.world.broadcast((self.word, look))
        if look:
            self._looked = now
            if not self.word and ray.train.get_preemption_info() is not None:
                self.word = "leave"
        return bool(self.word)
