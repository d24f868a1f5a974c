"""Running and resuming a sweep, and training one recipe: the stages in order.

prepare -> executors -> Ray Tune (proxies, Optuna, scheduler) -> decide -> report
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
from raytune_vlm.prepare.overlap import write_overlaps
from raytune_vlm.prepare.plan import Plan, plan_spec, resolved_steps
from raytune_vlm.prepare.prepare import (
    PreparedData,
    list_shards,
    prepare,
    write_quarantine,
)
from raytune_vlm.prepare.shard import ShardJob
from raytune_vlm.records import BASE_TRIAL, Scores, SweepFolder, read_json, write_json
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.detect import base_scores, detectable_lines
from raytune_vlm.sweep.jobs import Job, PreparedBenchmark
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import Ledger, TrialState, replay
from raytune_vlm.sweep.rungs import check_rungs
from raytune_vlm.train.packages import check_packages, check_searcher


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
    check_searcher(experiment.sweep)
    family = check_model(experiment.model)
    family.check_scopes(experiment.lora_scopes())
    family.check_packing(experiment.train.pack_tokens)
    return list_shards(experiment)


def check_search(experiment: ExperimentConfig) -> None:
    """Raise ConfigError if no trial of the search space can keep the constraints."""
    from raytune_vlm.sweep.constraints import Predictor, check_constraints

    check_constraints(experiment, Predictor(experiment))


def check_warm_start(experiment: ExperimentConfig, data_digest: str) -> None:
    """Raise ConfigError for a sweep that this one cannot start from, before its folder is made."""
    from raytune_vlm.sweep.warm_start import read_sweep

    for place in experiment.sweep.warm_start:
        read_sweep(experiment, data_digest, Path(place))


def run_sweep(experiment: ExperimentConfig, *, command: str, monitor: Monitor) -> SweepFolder:
    """Run a new sweep to its report.

    Raises
    ------
    ConfigError
        If the sweep folder exists already.
    SweepInterrupted
        If it was stopped before its end; `resume` continues it.
    """
    from raytune_vlm.sweep.guard import guard_suite, prepare_guard

    experiment = located(experiment)
    folder = SweepFolder(Path(experiment.storage_path) / experiment.name)
    if folder.experiment_file.exists():
        raise ConfigError(
            f"{folder.root} holds a sweep already: `raytune-vlm resume {folder.root}` continues "
            "it, another name= starts a new one"
        )
    jobs = plan_of(experiment)
    guard_suite(experiment)
    check_search(experiment)
    with ray_session(experiment):
        data = prepare_data(experiment, jobs, monitor)
        check_warm_start(experiment, data.manifest.digest)
        require_splits(data, "select", "report")
        resolved = with_steps(experiment, data, monitor)
        check_rungs(resolved, data.split("select"))
        say_detectable(resolved, data, monitor)
        prepare_guard(experiment, monitor)
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
    from raytune_vlm.sweep.guard import prepare_guard

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
        resolved = with_steps(experiment, data, monitor)
        say_detectable(resolved, data, monitor, base_scores(folder))
        prepare_guard(experiment, monitor)
        return _drive(resolved, folder, data, monitor)


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
        data = prepare_data(experiment, jobs, monitor)
        say_detectable(experiment, data, monitor)
        return data


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
    from raytune_vlm.sweep.board import start_board
    from raytune_vlm.sweep.executor import executors
    from raytune_vlm.sweep.worker import ExecutorSetup

    began = time.monotonic()
    states = replay(folder.ledger_file)
    ledger = Ledger(folder.ledger_file)
    if states:
        ledger.append("resumed")
    names = [f"executor-{number}" for number in range(experiment.sweep.num_executors)]
    board = start_board(names, experiment.sweep.max_failures)
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
        with executors(setup, names, monitor):
            yield Session(experiment, folder, monitor, data, board, ledger, states, began)
    finally:
        shutil.rmtree(setup.scratch, ignore_errors=True)


@dataclass(frozen=True)
class Scoring:
    """A checkpoint to score on a split; without a trial, the base model."""

    trial: TrialState | None
    split: str
    step: int
    benchmark: PreparedBenchmark | None = None
    """What is asked instead of the experiment's own split; `split` is its name."""
    adapter: Path | None = None
    """A PEFT adapter on the base model, instead of a trial."""

    @property
    def trial_id(self) -> str:
        """Whose folder the scores go to."""
        if self.adapter is not None:
            return f"adapter-{self.adapter.name}"
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
            benchmark=self.benchmark,
            adapter=None if self.adapter is None else str(self.adapter),
        )


def evaluate(running: Session, scorings: list[Scoring]) -> None:
    """Score checkpoints, all executors at once, and wait; what was scored is left as it is.

    Every scoring on `report` is a `touched` event of the ledger, also one whose event was lost when
    an earlier life of the sweep ended in between.

    Raises
    ------
    EvaluationError
        If one of them could not be scored.
    """
    import ray

    folder = running.folder
    jobs = [None if s.scores_file(folder).exists() else s.job() for s in scorings]
    for new in filter(None, jobs):
        ray.get(running.board.submit.remote(new))
    known = {(row["trial_id"], row["step"]) for row in folder.report_touches()}
    for scoring, job in zip(scorings, jobs, strict=True):
        if job is not None:
            report: dict[str, Any] = ray.get(running.board.next_report.remote(job.job_id))
            if "failed" in report:
                raise EvaluationError(
                    f"scoring {job.trial_id} on {job.split} failed: {report['message']}"
                )
            for note in report.get("notes", ()):
                running.ledger.append("noted", trial_id=job.trial_id, message=note)
                running.monitor.say(note)
        touch = (scoring.trial_id, scoring.step)
        if scoring.split == "report" and (job is not None or touch not in known):
            running.ledger.append("touched", trial_id=touch[0], step=touch[1])


def score_base(running: Session) -> None:
    """Put the base model's scoring on `select` up first; the report shows it as the baseline."""
    import ray

    base = Scoring(None, "select", 0)
    if not base.scores_file(running.folder).exists():
        ray.get(running.board.submit.remote(base.job()))


def prepare_data(
    experiment: ExperimentConfig,
    jobs: list[ShardJob],
    monitor: Monitor,
    *,
    for_training: bool = True,
) -> PreparedData:
    """Prepare the data and say what it is; see `prepare.prepare`."""
    monitor.say(f"data: {len(jobs)} shards of {len(experiment.data.sources)} sources")
    data = prepare(
        experiment,
        jobs,
        lambda step, done, total: monitor.progress(f"data: shards, {step}", done, total),
        for_training=for_training,
    )
    splits = ", ".join(f"{name} {entry.num_used}" for name, entry in data.manifest.splits.items())
    monitor.say(
        f"data: {splits} samples; {len(data.quarantine)} quarantined "
        f"({data.manifest.seconds:.1f} s, {data.manifest.digest})"
    )
    monitor.say(f"data: tier {data.manifest.tier}: {data.manifest.tier_reason}")
    for pair, count in data.manifest.overlap.items():
        known, asked = pair.split("/")
        kinds = ", ".join(
            f"{kind.replace('_', ' ')} {number}"
            for kind, number in data.manifest.overlap_kinds[pair].items()
        )
        monitor.say(f"data: WARNING: {count} samples of {asked} are like some of {known} ({kinds})")
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
        problems = [str(entry["msg"]).removeprefix("Value error, ") for entry in error.errors()]
    else:
        problems = [f"{key}: {why}" for key, why in search_space_problems(resolved)]
    if problems:
        raise ConfigError(
            f"train.epochs={experiment.train.epochs:g} are {steps} steps: {'; '.join(problems)}"
        )
    return resolved


def say_detectable(
    experiment: ExperimentConfig,
    data: PreparedData,
    monitor: Monitor,
    pilot: Scores | None = None,
) -> None:
    """Say which differences the splits can tell, before anything is trained."""
    sizes = {name: (e.num_used, e.num_groups) for name, e in data.manifest.splits.items()}
    for line in detectable_lines(experiment, sizes, pilot):
        monitor.say(f"data: {line}")


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
    write_overlaps(folder.overlap_file, data.overlaps)
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
