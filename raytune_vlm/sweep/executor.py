"""The resident executor, seen from the driver: a long-lived Ray Train run in a thread.

Ray Train restarts dead workers; the board hands the interrupted job out again, and it goes on from
its newest checkpoint. A node that announces its end is left at once: the job is saved and handed
back, and the executor starts anew elsewhere.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from raytune_vlm.errors import InfrastructureError, SweepInterrupted, first_line
from raytune_vlm.monitor import Monitor
from raytune_vlm.sweep.attendance import Attendance
from raytune_vlm.sweep.heartbeat import UNTIL_MOVING
from raytune_vlm.sweep.worker import ExecutorSetup, executor_loop

KILLED_S = 10.0
"""How long a thread whose controller was killed may take to see it."""


@contextmanager
def executors(setup: ExecutorSetup, names: list[str], monitor: Monitor) -> Iterator[None]:
    """Start one Ray Train run per name in threads; send them home and wait on leaving.

    Raises
    ------
    InfrastructureError
        On leaving, if all executors ended with an error.
    SweepInterrupted
        If nodes were missing for longer than `sweep.max_wait_s`, a disk is full, or the board died.
    """
    errors: list[str] = []
    board = setup.board

    def carry_out(name: str) -> None:
        for life in itertools.count():
            failure = None
            try:
                _trainer(replace(setup, name=name), life).fit()
            except Exception as error:
                failure = first_line(error)
            try:
                # Also without a failure: when its node announced its end.
                if ray.get(board.goes_on.remote(name)):
                    continue
                if failure is not None:
                    errors.append(f"{name}: {failure}")
                    ray.get(board.abandon.remote(name, f"executor {name} failed: {failure}"))
            except RayActorError:
                pass  # without the board the run ends, see below
            return

    threads = [
        threading.Thread(target=carry_out, args=(name,), name=name, daemon=True) for name in names
    ]
    for thread in threads:
        thread.start()
    attendance = Attendance(board, setup.experiment, monitor)
    goes_on = (
        f"`raytune-vlm resume {setup.folder}` (after `train`: the same `train` again) "
        "goes on from here"
    )
    grace_s = setup.experiment.train.grace_s
    try:
        try:
            with attendance:
                yield
        finally:
            try:
                ray.get(board.close.remote())
            except RayActorError:
                grace_s = 0.0  # nobody can be told to save
            failed = _send_home(threads, grace_s, errors)
            if attendance.missing is not None:
                raise SweepInterrupted(f"{attendance.missing}; {goes_on}")
    except RayActorError as error:
        # No other actor is asked by the driver itself. What was trained is on the disk.
        raise SweepInterrupted(f"the board died ({first_line(error)}); {goes_on}") from None
    if len(failed) == len(names):
        raise InfrastructureError("; ".join(failed))


def _send_home(threads: list[threading.Thread], grace_s: float, errors: list[str]) -> list[str]:
    """Wait for the executors' threads, then end those that are left; the errors until then.

    One that waits for a node would wait for ever, and a thread that is inside Ray when Ray is shut
    down ends this process with status 1.
    """
    ends = time.monotonic() + grace_s
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    failed = list(errors)
    if any(thread.is_alive() for thread in threads):
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        for actor_id, actor in ray._private.state.actors(job_id=job).items():
            if actor["ActorClassName"] == "TrainController" and actor["State"] == "ALIVE":
                core = ray._private.worker.global_worker.core_worker
                core.kill_actor(ray.ActorID.from_hex(actor_id), True)
        for thread in threads:
            thread.join(KILLED_S)
    return failed


def _trainer(setup: ExecutorSetup, life: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = setup.experiment.train
    resources = {"CPU": train.cpus_per_worker}
    if train.gpus_per_worker:
        resources["GPU"] = train.gpus_per_worker
    return TorchTrainer(
        executor_loop,
        train_loop_config={"setup": setup},
        torch_config=TorchConfig(
            backend="nccl" if train.gpus_per_worker else "gloo",
            timeout_s=math.ceil(UNTIL_MOVING * train.hang_timeout_s),
        ),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=bool(train.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{setup.experiment.name}-{setup.name}-{life}",
            storage_path=setup.scratch,
            failure_config=FailureConfig(
                max_failures=setup.experiment.sweep.max_failures,
                # A node that is missing: `Attendance` says for how long.
                controller_failure_limit=-1,
            ),
        ),
    )
