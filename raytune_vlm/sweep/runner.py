"""Running and resuming a sweep, and training one recipe: the stages in order.

prepare -> executors -> Ray Tune (proxies, Optuna, ASHA) -> decide -> report
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import ConfigError, DataError, RaytuneVlmError, SweepInterrupted
from raytune_vlm.models.loading import check_model
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.feed import STREAM_CPUS
from raytune_vlm.prepare.prepare import (
    PreparedData,
    list_shards,
    prepare,
    write_quarantine,
)
from raytune_vlm.prepare.shard import ShardJob
from raytune_vlm.records import BASE_TRIAL, SweepFolder, read_json, write_json
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import Ledger, TrialState, replay

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
    # Otherwise a warning about many small processes on a machine with few cores.
    "RAY_worker_maximum_startup_concurrency": "8",
}


@dataclass
class Session:
    """What the stages of one run share."""

    experiment: ExperimentConfig
    folder: SweepFolder
    monitor: Monitor
    data: PreparedData
    board: Any
    ledger: Ledger
    states: dict[str, TrialState]
    began: float


def located(experiment: ExperimentConfig) -> ExperimentConfig:
    """The experiment with absolute local paths: Ray's workers run in folders of their own."""
    model, data = experiment.model, experiment.data
    local = model.name != "demo" and Path(model.name).is_dir()
    name = str(Path(model.name).resolve()) if local else model.name
    return experiment.model_copy(
        update={
            "storage_path": str(Path(experiment.storage_path).resolve()),
            "model": model.model_copy(update={"name": name}),
            "data": data.model_copy(update={"root": str(Path(data.root).resolve())}),
        }
    )


def plan_of(experiment: ExperimentConfig) -> list[ShardJob]:
    """Everything that can be checked before Ray starts: model, scopes, sources, resources.

    Raises
    ------
    ModelError, DataError, ConfigError
        One clear line about what is wrong.
    """
    family = check_model(experiment.model)
    family.check_scopes(_scopes(experiment))
    return list_shards(experiment)


def _scopes(experiment: ExperimentConfig) -> set[str]:
    searched = experiment.sweep.search_space.get("lora.scope")
    values = [experiment.lora.scope]
    if searched is not None:
        values += [str(value) for value in searched.corners()]
    return {scope for value in values for scope in value.split("+")}


def run_sweep(experiment: ExperimentConfig, *, command: str, monitor: Monitor) -> SweepFolder:
    """Run a new sweep to its report.

    Raises
    ------
    ConfigError
        If the sweep folder exists already.
    SweepInterrupted
        If it was stopped before its end; `resume` continues it.
    """
    experiment = located(experiment)
    folder = SweepFolder(Path(experiment.storage_path) / experiment.name)
    if folder.experiment_file.exists():
        raise ConfigError(
            f"{folder.root} holds a sweep already: `raytune-vlm resume {folder.root}` continues "
            "it, another name= starts a new one"
        )
    jobs = plan_of(experiment)
    with ray_session(experiment):
        data = prepare_data(experiment, jobs, monitor)
        _require_splits(data, "select", "report")
        write_head(folder, experiment, data, command)
        with Lease(folder.lease_file):
            return _drive(experiment, folder, data, monitor)


def resume_sweep(root: Path, *, monitor: Monitor) -> SweepFolder:
    """Continue a sweep from its folder; does nothing but the report if it had ended.

    Raises
    ------
    ConfigError
        If the folder holds no sweep.
    DataError
        If the data is no longer what the sweep began with.
    """
    from raytune_vlm.report import build_report

    folder = SweepFolder(root.resolve())
    if not folder.experiment_file.exists():
        raise ConfigError(f"{root} is not a sweep folder: it has no experiment.json")
    if folder.result_file.exists():
        monitor.say(f"{root} has ended already; writing its report again")
        build_report(folder.root)
        return folder
    head = read_json(folder.experiment_file)
    experiment = ExperimentConfig.model_validate(head["experiment"])
    jobs = plan_of(experiment)
    with Lease(folder.lease_file), ray_session(experiment):
        data = prepare_data(experiment, jobs, monitor)
        before = read_json(folder.manifest_file)["digest"]
        if data.manifest.digest != before:
            raise DataError(
                f"the data of {root} changed since the sweep began (was {before}, is "
                f"{data.manifest.digest}): its trials could not be compared; start a new sweep"
            )
        return _drive(experiment, folder, data, monitor)


def prepare_only(experiment: ExperimentConfig, *, monitor: Monitor) -> PreparedData:
    """Prepare the data of an experiment and print what it is."""
    experiment = located(experiment)
    jobs = plan_of(experiment)
    with ray_session(experiment):
        return prepare_data(experiment, jobs, monitor)


def _drive(
    experiment: ExperimentConfig, folder: SweepFolder, data: PreparedData, monitor: Monitor
) -> SweepFolder:
    from raytune_vlm.report import build_report
    from raytune_vlm.sweep.decide import decide
    from raytune_vlm.sweep.search import search

    with session(experiment, folder, data, monitor) as running:
        score_base(running)
        search(running)
        decide(running)
    build_report(folder.root)
    return folder


@contextmanager
def session(
    experiment: ExperimentConfig, folder: SweepFolder, data: PreparedData, monitor: Monitor
) -> Iterator[Session]:
    """Board, executors and ledger, open while trials run."""
    from raytune_vlm.sweep.board import Board
    from raytune_vlm.sweep.executor import executors
    from raytune_vlm.sweep.worker import ExecutorSetup

    began = time.monotonic()
    states = replay(folder.ledger_file)
    ledger = Ledger(folder.ledger_file)
    if states:
        ledger.append("resumed")
    names = [f"executor-{number}" for number in range(experiment.sweep.num_executors)]
    board = Board.remote(names, experiment.sweep.max_failures)
    setup = ExecutorSetup(
        name="",
        experiment=experiment,
        folder=str(folder.root),
        store=data.manifest.store,
        index_file=str(data.index_file),
        data_digest=data.manifest.digest,
        board=board,
        scratch=tempfile.mkdtemp(prefix="raytune_vlm-"),
    )
    try:
        with executors(setup, names):
            yield Session(experiment, folder, monitor, data, board, ledger, states, began)
    finally:
        shutil.rmtree(setup.scratch, ignore_errors=True)


def evaluate(running: Session, trial: TrialState | None, split: str, step: int) -> dict[str, Any]:
    """Score a checkpoint (or the base model, for None) on a split, unless it was; waits for it."""
    import ray

    from raytune_vlm.sweep.board import Job

    trial_id = trial.trial_id if trial else BASE_TRIAL
    known = running.folder.trial(trial_id).evaluation(split, step) / "scores.json"
    if known.exists():
        return read_json(known)
    job = Job(
        job_id=f"{trial_id}/{split}/{step}",
        kind="evaluate",
        trial_id=trial_id,
        recipe=trial.recipe if trial else {},
        split=split,
        step=step,
    )
    ray.get(running.board.submit.remote(job))
    report: dict[str, Any] = ray.get(running.board.next_report.remote(job.job_id))
    if "failed" in report:
        raise RaytuneVlmError(f"scoring {trial_id} on {split} failed: {report['message']}")
    return read_json(known)


def score_base(running: Session) -> None:
    """Put the base model's scoring on `select` up first; the report shows it as the baseline."""
    import ray

    from raytune_vlm.sweep.board import Job

    done = running.folder.trial(BASE_TRIAL).evaluation("select", 0) / "scores.json"
    if not done.exists():
        job = Job(f"{BASE_TRIAL}/select/0", "evaluate", BASE_TRIAL, {}, split="select")
        ray.get(running.board.submit.remote(job))


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
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        _check_resources(experiment, ray.cluster_resources())
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray.shutdown()


def _check_resources(experiment: ExperimentConfig, there: dict[str, float]) -> None:
    train = experiment.train
    workers = experiment.sweep.num_executors * train.num_workers
    light = PROXY_CPUS * experiment.sweep.num_executors
    if experiment.data.consumption == "streaming":
        light += STREAM_CPUS * workers
    asked = {"CPU": workers * train.cpus_per_worker + light, "GPU": workers * train.gpus_per_worker}
    for kind, amount in asked.items():
        if amount > there.get(kind, 0):
            raise ConfigError(
                f"sweep.num_executors x train.num_workers = {workers} workers ask for "
                f"{amount:g} {kind} (proxies and data tasks included), but the cluster has "
                f"{there.get(kind, 0):g}; lower sweep.num_executors"
            )


def prepare_data(
    experiment: ExperimentConfig, jobs: list[ShardJob], monitor: Monitor
) -> PreparedData:
    """Prepare the data and say what it is; see `prepare.prepare`."""
    monitor.say(f"data: {len(jobs)} shards of {len(experiment.data.sources)} sources")
    data = prepare(
        experiment, jobs, lambda done, total: monitor.progress("data shards", done, total)
    )
    splits = ", ".join(f"{name} {entry.num_used}" for name, entry in data.manifest.splits.items())
    monitor.say(
        f"data: {splits} samples; {len(data.quarantine)} quarantined "
        f"({data.manifest.seconds:.1f} s, {data.manifest.digest})"
    )
    for pair, count in data.manifest.overlap.items():
        monitor.say(f"data: WARNING: {count} groups stand in both {pair.replace('/', ' and ')}")
    return data


def _require_splits(data: PreparedData, *names: str) -> None:
    for name in names:
        if data.manifest.splits[name].num_used == 0:
            raise DataError(
                f"data.sources: no samples for {name!r}: give a source with split: {name}, or a "
                f"larger data.split.{name} for the {data.manifest.splits['train'].num_groups} "
                "groups there are"
            )


def write_head(
    folder: SweepFolder, experiment: ExperimentConfig, data: PreparedData, command: str
) -> None:
    """`experiment.json` and `data/`: written last before trials start, so that bad input
    leaves no sweep folder."""
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(folder.manifest_file, data.manifest)
    write_quarantine(folder.quarantine_file, data.quarantine)
    packages = ("ray", "torch", "transformers", "peft", "optuna", "pyarrow", "pillow", "numpy")
    write_json(
        folder.experiment_file,
        {
            "fingerprint": experiment.fingerprint(),
            "data": data.manifest.digest,
            "versions": {
                "python": platform.python_version(),
                "raytune-vlm": version("raytune-vlm"),
                **{name: version(name) for name in packages},
            },
            "command": command,
            "experiment": experiment.model_dump(mode="json"),
        },
    )


def interrupted(folder: SweepFolder, ended: int, total: int) -> SweepInterrupted:
    """The error of a sweep that was stopped, with the command that continues it."""
    return SweepInterrupted(
        f"stopped with {ended} of {total} trials ended; "
        f"`raytune-vlm resume {folder.root}` goes on from here"
    )
