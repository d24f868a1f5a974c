"""One recipe trained, or one checkpoint scored, on the same executors that a sweep uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from raytune_vlm.config.evaluation import RobustnessConfig
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import CheckpointError, ConfigError, RaytuneVlmError, did_you_mean
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import BASE_TRIAL, Scores, SweepFolder, read_json
from raytune_vlm.sweep import preparing, runner
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.folder_copy import copied
from raytune_vlm.sweep.gauging import Gauging
from raytune_vlm.sweep.head import read_head
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import TrialState, replay
from raytune_vlm.sweep.progress import Watcher
from raytune_vlm.sweep.rungs import check_rungs
from raytune_vlm.sweep.trackers.follower import Follower
from raytune_vlm.train.checkpoint import newest

BEST = "best"
"""Names the winner of a sweep that has ended, at the winner's step."""

TRAINED = "t0000"
"""The trial id of a recipe that `train` runs."""


def train_one(experiment: ExperimentConfig, *, command: str, monitor: Monitor) -> Path:
    """Train the experiment's own recipe to its end; returns the last checkpoint's folder.

    Called again for the same folder it goes on from the newest checkpoint.

    Raises
    ------
    ConfigError
        If the folder holds another experiment.
    """
    experiment = preparing.located(experiment)
    single = experiment.model_copy(
        update={
            "sweep": experiment.sweep.model_copy(
                update={"num_executors": 1, "slots": 1, "packing": "exact"}
            )
        }
    )
    folder = SweepFolder(Path(single.storage_path) / single.name)
    jobs = preparing.plan_of(single)
    is_new = not folder.experiment_file.exists()
    if not is_new:
        before = read_head(folder, "fingerprint")["fingerprint"]
        if before != single.fingerprint():
            raise ConfigError(f"{folder.root} holds another experiment; choose another name=")
        if _is_trained(folder):
            monitor.say(f"{folder.root} has been trained to its end already")
            return _last_checkpoint(folder)
    with ray_session(single):
        data = preparing.prepare_data(single, jobs, monitor)
        preparing.require_splits(data, "select")
        resolved = preparing.with_steps(single, data, monitor)
        check_rungs(resolved, data.split("select"))
        with Lease(folder.lease_file):
            preparing.write_head(folder, single, data, command)
            with (
                copied(folder, resolved, monitor, new=is_new),
                runner.session(resolved, folder, data, monitor) as running,
                Follower(folder, resolved, monitor.say),
                Gauging(running),
            ):
                _drive(running)
    return _last_checkpoint(folder)


def _is_trained(folder: SweepFolder) -> bool:
    state = replay(folder.ledger_file).get(TRAINED)
    return state is not None and state.ended == "finished"


def _last_checkpoint(folder: SweepFolder) -> Path:
    found, damaged = newest(folder.trial(TRAINED).checkpoints)
    if found is None:
        raise CheckpointError("; ".join(damaged) or f"{folder.root} has no checkpoint any more")
    return found


def _drive(running: runner.Session) -> None:
    states = running.states or {TRAINED: TrialState(TRAINED, 0, {})}
    state = states[TRAINED]
    if not running.states:
        running.ledger.append("proposed", trial_id=TRAINED, number=0, recipe={})
    if state.ended != "finished":
        with Watcher(running.monitor, running.board, running.experiment, states, lambda: 1):
            _follow(running, state)


def _follow(running: runner.Session, state: TrialState) -> None:
    job = Job(TRAINED, "trial", TRAINED, {}, reported=tuple(state.scored))
    ray.get(running.board.submit.remote(job))
    report: dict[str, Any] = {}
    while not report.get("done"):
        report = ray.get(running.board.next_report.remote(TRAINED))
        for note in report.get("notes", ()):
            running.ledger.append("noted", trial_id=TRAINED, message=note)
            running.monitor.say(f"{TRAINED}: {note}")
        if "failed" in report:
            running.ledger.append("failed", trial_id=TRAINED, message=report["message"])
            raise RaytuneVlmError(f"{report['failed']}: {report['message']}")
        step = int(report["step"])
        scores = {name: float(report[name]) for name in running.experiment.evaluation.metrics}
        running.ledger.append("scored", trial_id=TRAINED, step=step, scores=scores)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        running.monitor.say(f"step {step}: {shown}")
    running.ledger.append("finished", trial_id=TRAINED, step=step, message=None)


def evaluate_split(
    root: Path,
    trial_ids: Sequence[str],
    split: str,
    *,
    monitor: Monitor,
    trust: str | None = None,
    robustness: RobustnessConfig | None = None,
) -> dict[str, Scores]:
    """Score trials of a sweep folder, at the checkpoints that `chosen` finds, on a split.

    Several share batches. With `robustness` that curve is made too, also where the scores are there
    already: their answers are not asked for again.

    Raises
    ------
    ConfigError
        If the folder holds no sweep or no such trial, `trust` (MODEL@REVISION) does not fit, or
        `robustness` is asked of another split than `report`.
    """
    if robustness is not None and split != "report":
        raise ConfigError(f"robustness is measured on `report`, not on {split!r}")
    folder = SweepFolder(root.resolve())
    read_head(folder)
    scorings = chosen(folder, trial_ids, split)
    experiment = runner.recorded_experiment(folder, trust)
    if robustness is not None:
        curve = experiment.evaluation.model_copy(update={"robustness": robustness})
        experiment = experiment.model_copy(update={"evaluation": curve})
    jobs = preparing.plan_of(experiment)
    with Lease(folder.lease_file), ray_session(experiment):
        data = preparing.prepare_data(experiment, jobs, monitor)
        with runner.session(experiment, folder, data, monitor) as running:
            if robustness is not None:
                for scoring in scorings:
                    scoring.scores_file(folder).unlink(missing_ok=True)
            runner.evaluate(running, scorings)
            return {
                scoring.trial_id: Scores.from_json(read_json(scoring.scores_file(folder)))
                for scoring in scorings
            }


def chosen(folder: SweepFolder, trial_ids: Sequence[str], split: str) -> list[runner.Scoring]:
    """What of a sweep folder is scored, by names: a trial's newest checkpoint, `best` (the winner
    of a sweep that has ended, at the winner's step) or `base`.

    Raises
    ------
    ConfigError
        If there is no such trial, it has no checkpoint, or one is named twice.
    """
    known = replay(folder.ledger_file)
    found: list[runner.Scoring] = []
    for name in trial_ids:
        trial_id, step = name, 0
        if name == BEST:
            result = folder.result()
            if result is None:
                raise ConfigError(f"{folder.root} has no winner yet: give --trial a trial's id")
            trial_id, step = result.winner, result.winner_step
        elif name != BASE_TRIAL:
            if name not in known:
                near = did_you_mean(name, [*known, BASE_TRIAL, BEST])
                raise ConfigError(f"{folder.root} has no trial {name!r}{near}")
            checkpoint, _ = newest(folder.trial(name).checkpoints)
            if checkpoint is None:
                raise ConfigError(f"{folder.trial(name).root} has no whole checkpoint")
            step = int(checkpoint.name.removeprefix("step_"))
        if any(entry.trial_id == trial_id for entry in found):
            raise ConfigError(f"--trial {','.join(trial_ids)}: {trial_id} is named twice")
        found.append(runner.Scoring(known.get(trial_id), split, step))
    return found
