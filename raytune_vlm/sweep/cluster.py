"""Ray for one run: joined or started, with what the executors need, and shut down at the end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import ConfigError

SPARE_CPUS = 1
"""Logical CPUs declared beyond the machine's own on a local run: for proxies and data tasks."""

PROXY_CPUS = 0.01
"""CPUs of a trial's proxy: Ray refuses 0, and so little never keeps a trial from being placed."""

_RAY_SETTINGS = {
    # Ray Tune's own CSV, JSON and TensorBoard files: the ledger and metrics.jsonl have it all.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ray's new console output ignores verbose=0; we have a console of our own.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A failed trial reports no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # How often Ray Train looks for nodes that are about to go; a notice may be 30 s short.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Otherwise a warning about many small processes on a machine with few cores.
    "RAY_worker_maximum_startup_concurrency": "8",
}


@contextmanager
def ray_session(experiment: ExperimentConfig) -> Iterator[None]:
    """Ray, joined where RAY_ADDRESS names a cluster, else started here and shut down at the end.

    Raises
    ------
    ConfigError
        If the executors ask for more than the cluster has.
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
            "num_cpus": max(os.cpu_count() or 1, int(cpus + 0.999)) + SPARE_CPUS,
        }
    ray.init(
        logging_level="ERROR",
        log_to_driver=False,
        **local,
    )
    try:
        with interruptible():
            _check_resources(experiment, ray.cluster_resources())
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
    """What Ray Tune asks for a proxy: on the driver's own node, where it has CPUs for that.

    The end of another node then takes no proxy away.
    """
    import ray
    from ray.tune import PlacementGroupFactory

    home = ray.get_runtime_context().get_node_id()
    resources = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    bundles = [{"CPU": PROXY_CPUS}]
    if resources[home].get("CPU", 0) < 1:
        return PlacementGroupFactory(bundles)
    selector = [{ray._raylet.RAY_NODE_ID_KEY: home}]
    return PlacementGroupFactory(bundles, bundle_label_selector=selector)


def _check_resources(experiment: ExperimentConfig, there: dict[str, float]) -> None:
    train = experiment.train
    workers = experiment.sweep.num_executors * train.num_workers
    light = PROXY_CPUS * experiment.sweep.at_once
    asked = {"CPU": workers * train.cpus_per_worker + light, "GPU": workers * train.gpus_per_worker}
    for kind, amount in asked.items():
        if amount > there.get(kind, 0):
            raise ConfigError(
                f"sweep.num_executors x train.num_workers = {workers} workers ask for "
                f"{amount:g} {kind} (proxies included), but the cluster has "
                f"{there.get(kind, 0):g}; lower sweep.num_executors"
            )
