"""Running and resuming a sweep, and training one recipe: the stages in order.

prepare -> executors -> Ray Tune (proxies, Optuna, scheduler) -> decide -> report
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.server import ServedModel
from raytune_vlm.errors import ConfigError, DataError, EvaluationError, SweepInterrupted
from raytune_vlm.models.trust import with_trust
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.prepare import (
    PreparedData,
)
from raytune_vlm.records import BASE_TRIAL, SweepFolder
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.detect import pilot_scores
from raytune_vlm.sweep.folder_copy import copied
from raytune_vlm.sweep.gauging import Gauging
from raytune_vlm.sweep.head import experiment_in, read_head
from raytune_vlm.sweep.jobs import Job, PreparedBenchmark
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import Ledger, TrialState, num_ended, replay
from raytune_vlm.sweep.preparing import (
    check_head,
    located,
    plan_of,
    prepare_data,
    require_splits,
    say_detectable,
    versions,
    with_steps,
    write_head,
)
from raytune_vlm.sweep.rungs import check_rungs
from raytune_vlm.sweep.storage import storage_failure
from raytune_vlm.sweep.trackers.follower import Follower


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


def check_search(experiment: ExperimentConfig) -> None:
    """Raise ConfigError if no trial of the search space can keep the constraints."""
    from raytune_vlm.sweep.constraints import Predictor, check_constraints

    check_constraints(experiment, Predictor(experiment))


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
    from raytune_vlm.sweep.warm_start import check_warm_start

    experiment = located(experiment)
    folder = SweepFolder(Path(experiment.storage_path) / experiment.name)
    _refuse_known(folder)
    jobs = plan_of(experiment)
    guard_suite(experiment)
    check_search(experiment)
    check_warm_start(experiment)
    with ray_session(experiment):
        data = prepare_data(experiment, jobs, monitor)
        require_splits(data, "select", "report")
        resolved = with_steps(experiment, data, monitor)
        check_warm_start(resolved, data.manifest.digest)
        check_rungs(resolved, data.split("select"))
        say_detectable(resolved, data, monitor, pilot_scores(resolved, folder))
        prepare_guard(experiment, monitor)
        with Lease(folder.lease_file):
            _refuse_known(folder)  # another driver may have been as far as this
            write_head(folder, experiment, data, command)
            with copied(folder, resolved, monitor, new=True):
                return _drive(resolved, folder, data, monitor)


def _refuse_known(folder: SweepFolder) -> None:
    if folder.experiment_file.exists():
        raise ConfigError(
            f"{folder.root} holds a sweep already: `raytune-vlm resume {folder.root}` continues "
            "it, another name= starts a new one"
        )


def resume_sweep(root: Path, *, monitor: Monitor, trust: str | None = None) -> SweepFolder:
    """Continue a sweep from its folder; does nothing but the report if it had ended.

    Raises
    ------
    ConfigError
        If the folder holds no sweep, its experiment was changed, or `trust` (MODEL@REVISION) names
        other code than it ran.
    DataError
        If the data is no longer what the sweep began with.
    CheckpointError
        If the ledger is damaged.
    """
    from raytune_vlm.report.html import build_report
    from raytune_vlm.sweep.guard import prepare_guard

    folder = SweepFolder(root.resolve())
    read_head(folder)
    if folder.result() is not None and (folder.best / "README.md").exists():
        recorded = experiment_in(folder)
        monitor.say(f"{root} has ended already; writing its report again")
        build_report(folder.root)
        with Follower(folder, recorded, monitor.say):
            return folder
    experiment = recorded_experiment(folder, trust)
    before = check_head(folder, monitor)["data"]
    replay(folder.ledger_file)  # damage is told before anything starts
    jobs = plan_of(experiment)
    with Lease(folder.lease_file), ray_session(experiment):
        data = prepare_data(experiment, jobs, monitor)
        if data.manifest.digest != before:
            raise DataError(
                f"the data of {root} changed since the sweep began (was {before}, is "
                f"{data.manifest.digest}): its trials could not be compared; start a new sweep"
            )
        resolved = with_steps(experiment, data, monitor)
        say_detectable(resolved, data, monitor, pilot_scores(resolved, folder))
        prepare_guard(experiment, monitor)
        with copied(folder, resolved, monitor, new=False):
            return _drive(resolved, folder, data, monitor)


def recorded_experiment(folder: SweepFolder, trust: str | None) -> ExperimentConfig:
    """The experiment of a sweep folder, with the code of its model trusted anew.

    Raises
    ------
    ConfigError
        If `trust` (MODEL@REVISION) does not fit, or is not the code that the sweep ran; if the
        experiment is not one of this version, as where another one has written it.
    DataError
        If a link leads out of the folder.
    """
    folder.check_links()
    head = read_head(folder)
    # Where the folder is now, which may not be where it was made.
    plain = experiment_in(folder, storage_path=str(folder.root.parent))
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
    from raytune_vlm.report.html import build_report
    from raytune_vlm.sweep.decide import decide
    from raytune_vlm.sweep.gallery import write_gallery
    from raytune_vlm.sweep.planning import find_slots
    from raytune_vlm.sweep.search import search
    from raytune_vlm.sweep.study_notes import NUM_PICTURES, how_to_watch

    try:
        with (
            session(experiment, folder, data, monitor) as running,
            Follower(folder, experiment, monitor.say),
            Gauging(running),
        ):
            score_base(running)
            find_slots(running)
            write_gallery(folder, experiment, data, "select", NUM_PICTURES)
            monitor.say(how_to_watch(folder))
            search(running)
            decide(running)
    except (SweepInterrupted, KeyboardInterrupt) as stop:
        try:
            build_report(folder.root)  # what there is so far
        except Exception as error:
            failure = storage_failure(error, folder)
            if failure is None:
                raise
            monitor.say(f"the report could not be written: {failure}")
        if isinstance(stop, SweepInterrupted):
            raise
        ended = num_ended(replay(folder.ledger_file))
        raise interrupted(folder, ended, experiment.sweep.num_trials) from None
    except Exception as error:
        failure = storage_failure(error, folder)
        if failure is None:
            raise
        raise SweepInterrupted(
            f"{failure}; `raytune-vlm resume {folder.root}` goes on from here when the storage does"
        ) from None
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
        ledger.append("resumed", versions=versions())
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
    if size := experiment.train.feature_disk_gb:
        place = experiment.train.feature_folder(data.manifest.store)
        monitor.say(f"features of images: up to {size:g} GB of each node's disk, in {place}")
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
    served: ServedModel | None = None
    """Who answers in the place of an executor."""

    @property
    def trial_id(self) -> str:
        """Whose folder the scores go to."""
        if self.served is not None:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.served.model).strip("-.")
            return f"served-{name}"
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

    Checkpoints that are asked the same share batches (`evaluate.adapters.generate_many`).
    Every scoring on `report` is a `touched` event of the ledger, also one whose event was lost when
    an earlier life of the sweep ended in between.

    Raises
    ------
    EvaluationError
        If one of them could not be scored.
    """
    import ray

    folder = running.folder
    new = [scoring for scoring in scorings if not scoring.scores_file(folder).exists()]
    jobs = scoring_jobs(running.experiment, new)
    for job in jobs:
        ray.get(running.board.submit.remote(job))
    for job in jobs:
        report: dict[str, Any] = ray.get(running.board.next_report.remote(job.job_id))
        if "failed" in report:
            names = ", ".join(entry.trial_id for entry in (job, *job.others))
            raise EvaluationError(f"scoring {names} on {job.split} failed: {report['message']}")
        for trial_id, note in report["notes"]:
            running.ledger.append("noted", trial_id=trial_id, message=note)
            running.monitor.say(note)
    known = {(row["trial_id"], row["step"]) for row in folder.report_touches()}
    for scoring in scorings:
        touch = (scoring.trial_id, scoring.step)
        if scoring.split == "report" and (scoring in new or touch not in known):
            running.ledger.append("touched", trial_id=touch[0], step=touch[1])


def scoring_jobs(experiment: ExperimentConfig, scorings: Sequence[Scoring]) -> list[Job]:
    """Jobs for executors: checkpoints asked the same together, an equal share for each executor."""
    alike: dict[tuple[str, float], list[Job]] = {}
    for scoring in scorings:
        of_select = scoring.split == "select" and scoring.benchmark is None
        share = experiment.select_share(scoring.step) if of_select else 1.0
        alike.setdefault((scoring.split, share), []).append(scoring.job())
    jobs = []
    for group in alike.values():
        hands = min(len(group), experiment.sweep.num_executors)
        for first, *others in (group[number::hands] for number in range(hands)):
            jobs.append(replace(first, others=tuple(others)))
    return jobs


def score_base(running: Session) -> None:
    """Put the base model's scoring on `select` up first; the report shows it as the baseline."""
    import ray

    base = Scoring(None, "select", 0)
    if not base.scores_file(running.folder).exists():
        ray.get(running.board.submit.remote(base.job()))


def interrupted(folder: SweepFolder, ended: int, total: int) -> SweepInterrupted:
    """The error of a sweep that was stopped, with the command that continues it."""
    return SweepInterrupted(
        f"stopped with {ended} of {total} trials ended; "
        f"`raytune-vlm resume {folder.root}` goes on from here"
    )
