"""The resident executor, seen from the driver: a long-lived Ray Train run in a thread.

Ray Train restarts dead workers; the board hands the interrupted job out again, and it goes on from
its newest checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray

from raytune_vlm.errors import (
    InfrastructureError,
)
from raytune_vlm.sweep.worker import ExecutorSetup, executor_loop


@contextmanager
def executors(setup: ExecutorSetup, names: list[str]) -> Iterator[None]:
    """Start one Ray Train run per name in threads; send them home and wait on leaving.

    Raises
    ------
    InfrastructureError
        On leaving, if an executor ended with an error and nothing else is being raised.
    """
    errors: list[str] = []

    def carry_out(name: str) -> None:
        try:
            _trainer(replace(setup, name=name)).fit()
        except Exception as error:
            message = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            errors.append(f"{name}: {message}")
            ray.get(setup.board.abandon.remote(name, f"executor {name} failed: {message}"))

    threads = [
        threading.Thread(target=carry_out, args=(name,), name=name, daemon=True) for name in names
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ray.get(setup.board.close.remote())
        for thread in threads:
            thread.join()
    if len(errors) == len(names):
        raise InfrastructureError("; ".join(errors))


def _trainer(setup: ExecutorSetup) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = setup.experiment.train
    resources = {"CPU": train.cpus_per_worker}
    if train.gpus_per_worker:
        resources["GPU"] = train.gpus_per_worker
    return TorchTrainer(
        executor_loop,
        train_loop_config={"setup": setup},
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=bool(train.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{setup.experiment.name}-{setup.name}",
            storage_path=setup.scratch,
            failure_config=FailureConfig(
                max_failures=setup.experiment.sweep.max_failures, controller_failure_limit=0
            ),
        ),
    )
