"""Running and resuming a sweep, and training one recipe: the stages in order.

prepare -> executors -> Ray Tune (proxies, Optuna, ASHA) -> decide -> report
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.search_space import search_space_problems
from raytune_vlm.errors import ConfigError, DataError, EvaluationError, SweepInterrupted
from raytune_vlm.models.location import check_model
from raytune_vlm.models.trust import with_trust
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.plan import Plan, plan_spec, resolved_steps
from raytune_vlm.prepare.prepare import (
    PreparedData,
    list_shards,
    prepare,
    write_quarantine,
)
from raytune_vlm.prepare.shard import ShardJob
from raytune_vlm.records import BASE_TRIAL, SweepFolder, read_json, write_json
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import Ledger, TrialState, replay
from raytune_vlm.train.packages import check_packages


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
    check_packages(experiment.train)
    family = check_model(experiment.model)
    family.check_scopes(experiment.lora_scopes())
    family.check_packing(experiment.train.pack_tokens)
    return list_shards(experiment)


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
        require_splits(data, "select", "report")
        resolved = with_steps(experiment, data, monitor)
        write_head(folder, experiment, data, command)
        with Lease(folder.lease_file):
            return _drive(resolved, folder, data, monitor)


def resume_sweep(root: Path, *, monitor: Monitor, trust: str | None = None) -> SweepFolder:
    """Continue a sweep from its folder; does nothing but the report if it had ended.

    Raises
    ------
    ConfigError
        If the folder holds no sweep, or `trust` (MODEL@REVISION) names other code than it ran.
    DataError
        If the data is no longer what the sweep began with.
    """
    from raytune_vlm.report import build_report

    folder = SweepFolder(root.resolve())
    if not folder.experiment_file.exists():
        raise ConfigError(f"{root} is not a sweep folder: it has no experiment.json")
    if folder.result_file.exists() and (folder.best / "README.md").exists():
        monitor.say(f"{root} has ended already; writing its report again")
        build_report(folder.root)
        return folder
    experiment = recorded_experiment(folder, trust)
    jobs = plan_of(experiment)
    with Lease(folder.lease_file), ray_session(experiment):
        data = prepare_data(experiment, jobs, monitor)
        before = read_json(folder.manifest_file)["digest"]
        if data.manifest.digest != before:
            raise DataError(
                f"the data of {root} changed since the sweep began (was {before}, is "
                f"{data.manifest.digest}): its trials could not be compared; start a new sweep"
            )
        return _drive(with_steps(experiment, data, monitor), folder, data, monitor)


def recorded_experiment(folder: SweepFolder, trust: str | None) -> ExperimentConfig:
    """The experiment of a sweep folder, with the code of its model trusted anew.

    Raises
    ------
    ConfigError
        If `trust` (MODEL@REVISION) does not fit, or is not the code that the sweep ran.
    """
    head = read_json(folder.experiment_file)
    plain = ExperimentConfig.model_validate(head["experiment"])
    experiment = with_trust(plain, trust)
    before, now = head.get("trusted_code"), experiment.model.trusted_revision
    if before and now and before != now:
        raise ConfigError(
            f"{folder.root} was run with the code of {before}, not of {now}: its trials could not "
            "be compared; start a new sweep"
        )
    return experiment


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
        data=data.manifest,
        index_file=str(data.index_file),
        board=board,
        scratch=tempfile.mkdtemp(prefix="raytune_vlm-"),
    )
    monitor.say(f"executors: starting {len(names)}, each loads {experiment.model.name} once")
    try:
        with executors(setup, names):
            yield Session(experiment, folder, monitor, data, board, ledger, states, began)
    finally:
        shutil.rmtree(setup.scratch, ignore_errors=True)


@dataclass(frozen=True)
class Scoring:
    """A checkpoint to score on a split; without a trial, the base model."""

    trial: TrialState | None
    split: str
    step: int

    @property
    def trial_id(self) -> str:
        """Whose folder the scores go to."""
        return self.trial.trial_id if self.trial else BASE_TRIAL

    def scores_file(self, folder: SweepFolder) -> Path:
        """Where the scores are, once they are."""
        return folder.trial(self.trial_id).evaluation(self.split, self.step) / "scores.json"

    def job(self) -> Job:
        """The job for an executor."""
        return Job(
            job_id=f"{self.trial_id}/{self.split}/{self.step}",
            kind="evaluate",
            trial_id=self.trial_id,
            recipe=self.trial.recipe if self.trial else {},
            split=self.split,
            step=self.step,
        )


def evaluate(running: Session, scorings: list[Scoring]) -> None:
    """Score checkpoints, all executors at once, and wait; what was scored is left as it is.

    Raises
    ------
    EvaluationError
        If one of them could not be scored.
    """
    import ray

    jobs = [
        scoring.job() for scoring in scorings if not scoring.scores_file(running.folder).exists()
    ]
    for job in jobs:
        ray.get(running.board.submit.remote(job))
    for job in jobs:
        report: dict[str, Any] = ray.get(running.board.next_report.remote(job.job_id))
        if "failed" in report:
            raise EvaluationError(
                f"scoring {job.trial_id} on {job.split} failed: {report['message']}"
            )


def score_base(running: Session) -> None:
    """Put the base model's scoring on `select` up first; the report shows it as the baseline."""
    import ray

    base = Scoring(None, "select", 0)
    if not base.scores_file(running.folder).exists():
        ray.get(running.board.submit.remote(base.job()))


def prepare_data(
    experiment: ExperimentConfig, jobs: list[ShardJob], monitor: Monitor
) -> PreparedData:
    """Prepare the data and say what it is; see `prepare.prepare`."""
    monitor.say(f"data: {len(jobs)} shards of {len(experiment.data.sources)} sources")
    data = prepare(
        experiment,
        jobs,
        lambda step, done, total: monitor.progress(f"data: shards, {step}", done, total),
    )
    splits = ", ".join(f"{name} {entry.num_used}" for name, entry in data.manifest.splits.items())
    monitor.say(
        f"data: {splits} samples; {len(data.quarantine)} quarantined "
        f"({data.manifest.seconds:.1f} s, {data.manifest.digest})"
    )
    monitor.say(f"data: tier {data.manifest.tier}: {data.manifest.tier_reason}")
    for pair, count in data.manifest.overlap.items():
        known, asked = pair.split("/")
        monitor.say(f"data: WARNING: {count} samples of {asked} share group or images with {known}")
    return data


def with_steps(
    experiment: ExperimentConfig, data: PreparedData, monitor: Monitor
) -> ExperimentConfig:
    """The experiment with `train.max_steps` in place of `train.epochs`; see `resolved_steps`.

    Raises
    ------
    ConfigError
        If rungs or warm-up do not fit so many steps.
    """
    if experiment.train.epochs is None:
        return experiment
    steps = resolved_steps(experiment, _plan(experiment, data))
    monitor.say(f"train: {experiment.train.epochs:g} epochs are {steps} steps")
    try:
        resolved = experiment.with_recipe({"train.epochs": None, "train.max_steps": steps})
    except ValidationError as error:
        problems = [str(entry["msg"]) for entry in error.errors()]
    else:
        problems = [f"{key}: {why}" for key, why in search_space_problems(resolved)]
    if problems:
        raise ConfigError(
            f"train.epochs={experiment.train.epochs:g} are {steps} steps: {'; '.join(problems)}"
        )
    return resolved


def require_splits(data: PreparedData, *names: str) -> None:
    """Raise DataError for a split without samples."""
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
    write_json(folder.plan_file, _plan_record(experiment, data))
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
            "trusted_code": experiment.model.trusted_revision,
            "experiment": experiment.model_dump(mode="json"),
        },
    )


def _plan(experiment: ExperimentConfig, data: PreparedData) -> Plan:
    split, spec = data.split("train"), plan_spec(experiment)
    return Plan(split.lengths, split.sources, spec, data_digest=data.manifest.digest)


def _plan_record(experiment: ExperimentConfig, data: PreparedData) -> dict[str, Any]:
    """What `data/plan.json` says: which samples make up which step follows from it."""
    plan = _plan(experiment, data)
    return {
        "digest": plan.digest,
        "data": data.manifest.digest,
        "num_samples": len(data.split("train")),
        "num_steps": resolved_steps(experiment, plan),
        **asdict(plan.spec),
    }


def interrupted(folder: SweepFolder, ended: int, total: int) -> SweepInterrupted:
    """The error of a sweep that was stopped, with the command that continues it."""
    return SweepInterrupted(
        f"stopped with {ended} of {total} trials ended; "
        f"`raytune-vlm resume {folder.root}` goes on from here"
    )
