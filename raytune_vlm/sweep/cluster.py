"""Ray for one run: joined or started, with what the executors need, and shut down at the end."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import ConfigError

SPARE_CPUS = 1
"""Logical CPUs declared beyond the machine's own on a local run: for data tasks."""

PROXY_SHARE = 0.0001
"""What a trial's proxy takes of the resource that every node has one of, the least that Ray counts:
a placement group must ask for something."""

ROUNDING = 1e-9

_RAY_SETTINGS = {
    # Ray Tune's own CSV, JSON and TensorBoard files: the ledger and metrics.jsonl have it all.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Nor its snapshot of all trials, which it would write anew every ten seconds.
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    # Ray's new console output ignores verbose=0; we have a console of our own.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A failed trial reports no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # How often Ray Train looks for nodes that are about to go; a notice may be 30 s short.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Otherwise a warning about many small processes on a machine with few cores.
    "RAY_worker_maximum_startup_concurrency": "8",
    # What Ray Data reports of each run would take an actor: the start of another process.
    "RAY_DATA_USAGE_DISABLED": "1",
}


@contextmanager
def ray_session(experiment: ExperimentConfig) -> Iterator[None]:
    """Ray, joined where RAY_ADDRESS names a cluster, else started here and shut down at the end.

    Raises
    ------
    ConfigError
        If the executors ask for more than the cluster could ever give them.
    """
    for key, value in _RAY_SETTINGS.items():
        os.environ.setdefault(key, value)
    import ray

    joined = bool(os.environ.get("RAY_ADDRESS"))
    train, sweep = experiment.train, experiment.sweep
    local: dict[str, Any] = {}
    if not joined:
        # A cluster of its own turns Ray's token authentication on by itself.
        cpus = sweep.num_executors * train.num_workers * train.cpus_per_worker
        local = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus - ROUNDING)) + SPARE_CPUS,
        }
    ray.init(
        logging_level="ERROR",
        log_to_driver=False,
        **local,
    )
    try:
        with interruptible():
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            check_resources(experiment, alive)
            yield
    finally:
        ray.shutdown()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, and Ctrl-C does it also where the shell had it ignored.

    A script's `&` leaves SIGINT ignored, to everything that is started so: a job's driver, too, if
    its cluster was.
    """
    previous = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if previous[signal.SIGINT] == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def check_storage(storage_path: str) -> None:
    """Raise ConfigError for a folder that would lie in a job's copy of the working directory."""
    if not Path(storage_path).is_absolute():
        raise ConfigError(
            f"storage_path {storage_path}: is relative, and a job runs in Ray's copy of the "
            "working directory, which is deleted after it; give an absolute path that all nodes "
            "see: storage_path=/shared/runs"
        )


def runs_in_copy() -> bool:
    """Whether this process is the driver of a Ray job that was sent its working directory."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    working_dir = (job.get("runtime_env") or {}).get("working_dir")
    return working_dir is not None and not working_dir.startswith("local://")


def proxy_resources() -> Any:
    """What Ray Tune asks for a proxy: next to nothing of the driver's own node, and no CPU.

    The end of another node then takes no proxy away, and two sweeps whose executors take all CPUs
    do not wait for each other's proxies for ever.
    """
    import ray
    from ray.tune import PlacementGroupFactory

    home = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == home)
    own = next(x for x in resources if x.startswith("node:") and not x.startswith("node:__"))
    return PlacementGroupFactory([{own: PROXY_SHARE}])


def check_resources(experiment: ExperimentConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse workers that the nodes could not hold if nothing else ran on them.

    Raises
    ------
    ConfigError
        With what was asked and what is there.
    """
    train, sweep = experiment.train, experiment.sweep
    workers = sweep.num_executors * train.num_workers
    room = sum(_workers_on(experiment, node) for node in nodes)
    if room >= workers:
        return
    each = f"{train.cpus_per_worker:g} CPU"
    if train.gpus_per_worker:
        each += f" + {train.gpus_per_worker:g} GPU"
    kinds = Counter((node.get("GPU", 0), node.get("CPU", 0)) for node in nodes)
    there = ", ".join(
        f"{count} node{'s' if count > 1 else ''} of {cpus:g} CPU + {gpus:g} GPU"
        for (gpus, cpus), count in sorted(kinds.items(), reverse=True)
    )
    raise ConfigError(
        f"sweep.num_executors={sweep.num_executors} x train.num_workers={train.num_workers} "
        f"= {workers} workers ask for {each} each, but the cluster has room for {room}: "
        f"{there}; lower one of them, train.cpus_per_worker or "
        "train.gpus_per_worker"
    )


def _workers_on(experiment: ExperimentConfig, node: Mapping[str, float]) -> int:
    """How many workers an empty node holds; a part of a GPU lies on one of them."""
    train = experiment.train
    found = int(node.get("CPU", 0) / train.cpus_per_worker + ROUNDING)
    gpus, asked = node.get("GPU", 0), train.gpus_per_worker
    if 0 < asked < 1:
        return min(found, int(gpus + ROUNDING) * int(1 / asked + ROUNDING))
    return min(found, int(gpus / asked + ROUNDING)) if asked else found
