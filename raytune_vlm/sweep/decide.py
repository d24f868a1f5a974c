"""The decision: the winner, what it is worth, and what it beats.

Everything that the search scored on `select` is a configuration: each trial at each rung. The
winner is the best of them, and with several seeds the best trial of the recipe with the best mean.
The bias of having been picked is estimated over all of them; `report` is then scored once for the
base model, the default recipe and the winner.
"""

from __future__ import annotations

import math
import shutil
import time
from typing import Any

import ray

from raytune_vlm.config.loader import render
from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.matrix import read_matrix
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.evaluate.statistics import (
    corrected_winner,
    indistinguishable,
)
from raytune_vlm.models.export import write_adapter
from raytune_vlm.records import (
    GuardScore,
    PairedTest,
    Replicate,
    SweepFolder,
    SweepResult,
    read_json_lines,
    write_json,
    write_text,
)
from raytune_vlm.report.lineage import caution, lineage
from raytune_vlm.report.model_card import model_card
from raytune_vlm.sweep.budget import held_seconds
from raytune_vlm.sweep.comparisons import (
    Candidate,
    adjusted,
    against_base,
    clean_scores,
    detectable_by_split,
    scored,
    test_pair,
)
from raytune_vlm.sweep.constraints import infeasible
from raytune_vlm.sweep.export import own_experiment
from raytune_vlm.sweep.front import besides
from raytune_vlm.sweep.gallery import write_gallery
from raytune_vlm.sweep.guard import score_guard
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.ledger import TrialState, trial_name
from raytune_vlm.sweep.replicates import by_recipe, recipe_id, value_at
from raytune_vlm.sweep.runner import Scoring, Session, evaluate

GALLERY_SIZE = 256
"""Pictures of `report` samples kept beside the report."""


def decide(running: Session) -> SweepResult:
    """Pick the winner, score `report`, write `best/` and `result.json`; the model card, which
    speaks of the result, comes last.

    Raises
    ------
    EvaluationError
        If no trial was ever scored.
    """
    experiment, folder = running.experiment, running.folder
    candidates = _candidates(running)
    teams = _teams(running, candidates)
    winner = _best(teams[0], experiment.mode, folder)
    statistics = _selection(running, candidates, winner)
    running.monitor.say(
        f"winner: {winner.trial.trial_id} at step {winner.step}{_among(teams[0])}; scoring "
        "`report` once each for base, default and winner"
    )
    roles, paired, guard = _report(running, teams, winner)
    tops = _tops(teams, experiment.mode, folder)[: experiment.sweep.replicate_top]
    replicates = _replicates(running, tops)
    clean, num_clean = clean_scores(running, roles, winner)
    result = SweepResult(
        metric=experiment.metric,
        mode="max" if experiment.mode == "max" else "min",
        winner=winner.trial.trial_id,
        winner_step=winner.step,
        default=roles.get("default"),
        naive=winner.value,
        corrected=statistics["corrected"],
        report=roles,
        paired=paired,
        indistinguishable=statistics["indistinguishable"],
        num_report_touches=len(folder.report_touches()),
        seconds=held_seconds(read_json_lines(folder.ledger_file), time.time()),
        replicates=replicates,
        replicated={entry.trial.trial_id: entry.value for entry in tops if replicates},
        against_base=against_base(running),
        detectable=detectable_by_split(running),
        clean=clean,
        num_clean=num_clean,
        guard=guard,
        seeds_of_winner=_seeds_of(teams[0]),
        **besides(experiment, running.states),
    )
    if result.best_by_seeds() not in (None, result.winner):
        running.monitor.say(
            f"over other seeds {result.best_by_seeds()} is better on the mean than the winner "
            f"{result.winner}: its lead may be the luck of the seed"
        )
    write_gallery(folder, experiment, running.data, "report", GALLERY_SIZE)
    _write_best(running, winner)
    write_json(folder.result_file, result)
    write_text(folder.best / "README.md", model_card(folder))
    running.ledger.append("decided", trial_id=winner.trial.trial_id, step=winner.step)
    return result


def _candidates(running: Session) -> list[Candidate]:
    """Who can win: all scores that were made on the same samples, the largest part of `select`.

    With `evaluation.rung_samples` early rungs see less of `select`; their scores do not compare
    with those of the last rung, and are left out unless no trial came so far.
    """
    experiment = running.experiment
    found = [x for x in scored(running) if infeasible(experiment, x.trial) is None]
    if not found:
        states = running.states.values()
        reasons = sorted(
            {str(infeasible(running.experiment, state) or state.message) for state in states}
        )
        raise EvaluationError(f"no trial was scored: {'; '.join(reasons)}")
    shares = {entry.step: experiment.select_share(entry.step) for entry in found}
    most = max(shares.values())
    if most < 1:
        running.monitor.say(
            f"no trial was scored on all of select: comparing scores on a share of {most:g}"
        )
    return [entry for entry in found if shares[entry.step] == most]


def _sign(mode: str) -> int:
    return 1 if mode == "max" else -1


def _cost(folder: SweepFolder, trial_id: str) -> int:
    return folder.trial(trial_id).record().trainable_parameters


def _best(candidates: list[Candidate], mode: str, folder: SweepFolder) -> Candidate:
    """The best score; among equals the fewest trainable parameters, then steps, then number."""
    return min(candidates, key=lambda entry: _rank([entry], mode, folder))


def _rank(team: list[Candidate], mode: str, folder: SweepFolder) -> tuple[float, int, int, int]:
    """What candidates that are judged together are sorted by, the best first: their mean score."""
    first, mean = team[0], sum(entry.value for entry in team) / len(team)
    value = math.inf if math.isnan(mean) else -_sign(mode) * mean
    return value, _cost(folder, first.trial.trial_id), first.step, first.trial.number


def _teams(running: Session, candidates: list[Candidate]) -> list[list[Candidate]]:
    """The candidates by recipe and rung, the best recipe first; most have one trial alone.

    A recipe is judged where all of its trials have come (`replicates.value_at`), and by those that
    are there only if that is so of no recipe at all.
    """
    metric = running.experiment.metric
    recipes = {recipe_id(own[0]): own for own in by_recipe(running.states.values())}
    found: dict[tuple[str, int], list[Candidate]] = {}
    for entry in candidates:
        found.setdefault((recipe_id(entry.trial), entry.step), []).append(entry)
    whole = [
        team
        for (name, step), team in found.items()
        if len(recipes[name]) == 1 or _is_number(value_at(recipes[name], step, metric))
    ]
    mode, folder = running.experiment.mode, running.folder
    return sorted(whole or found.values(), key=lambda team: _rank(team, mode, folder))


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _seeds_of(team: list[Candidate]) -> dict[str, float]:
    """Trial -> score, where a recipe has several trials."""
    return {entry.trial.trial_id: entry.value for entry in team} if len(team) > 1 else {}


def _among(team: list[Candidate]) -> str:
    scores = _seeds_of(team).values()
    mean = f"{sum(scores) / len(scores):.3f}" if scores else ""
    return f", the best of the {len(scores)} seeds of its recipe (mean {mean})" if scores else ""


def _selection(running: Session, candidates: list[Candidate], winner: Candidate) -> dict[str, Any]:
    experiment, folder = running.experiment, running.folder
    options: dict[str, Any] = {
        "mode": experiment.mode,
        "confidence": experiment.evaluation.confidence,
        "num_bootstrap": experiment.evaluation.num_bootstrap,
        "seed": experiment.seed,
        "combine": METRICS[experiment.metric].combine,
    }
    files = [
        folder.trial(entry.trial.trial_id).evaluation("select", entry.step) / "predictions.parquet"
        for entry in candidates
    ]
    values, weights, groups, _ = read_matrix(files, experiment.metric)
    corrected = None
    if len(candidates) > 1 and len(set(groups)) > 1:
        rows = {(entry.trial.trial_id, entry.step): row for row, entry in enumerate(candidates)}
        teams = [
            [rows[entry.trial.trial_id, entry.step] for entry in team]
            for team in _teams(running, candidates)
        ]
        judged = teams if experiment.sweep.seeds > 1 else None
        corrected = corrected_winner(values, weights, groups, teams=judged, **options)
    best_rows = _best_rows(candidates, experiment.mode, winner)
    same = indistinguishable(
        values[best_rows],
        weights[best_rows],
        groups,
        winner=best_rows.index(candidates.index(winner)),
        **options,
    )
    ids = [candidates[best_rows[place]].trial.trial_id for place in same]
    return {
        "corrected": corrected,
        "indistinguishable": sorted(ids, key=lambda trial_id: _cost(folder, trial_id)),
    }


def _best_rows(candidates: list[Candidate], mode: str, winner: Candidate) -> list[int]:
    """For each trial the row of its best candidate; the winner's own row for its trial."""
    best: dict[str, int] = {winner.trial.trial_id: candidates.index(winner)}
    for row, entry in enumerate(candidates):
        known = best.get(entry.trial.trial_id)
        if known is None or (
            known != candidates.index(winner)
            and _sign(mode) * entry.value > _sign(mode) * candidates[known].value
        ):
            best[entry.trial.trial_id] = row
    return sorted(best.values())


def _tops(teams: list[list[Candidate]], mode: str, folder: SweepFolder) -> list[Candidate]:
    """The best trial of each recipe, the best recipe first; it is the winner's."""
    best: dict[str, Candidate] = {}
    for team in teams:
        best.setdefault(recipe_id(team[0].trial), _best(team, mode, folder))
    return [*best.values()]


def _report(
    running: Session, teams: list[list[Candidate]], winner: Candidate
) -> tuple[dict[str, str], list[PairedTest], list[GuardScore]]:
    experiment, folder = running.experiment, running.folder
    chosen: dict[str, tuple[TrialState | None, int]] = {"base": (None, 0)}
    if experiment.sweep.include_default:
        # Stopped early, it has only been scored on a part of `select`: then that must do.
        first = trial_name(0)
        own = next((team for team in teams if recipe_id(team[0].trial) == first), [])
        own = own or [entry for entry in scored(running) if entry.trial.number == 0][-1:]
        if own:
            default = _best(own, experiment.mode, folder)
            chosen["default"] = (default.trial, default.step)
    chosen["winner"] = (winner.trial, winner.step)
    scorings = {role: Scoring(trial, "report", step) for role, (trial, step) in chosen.items()}
    evaluate(running, list({s.scores_file(folder): s for s in scorings.values()}.values()))
    files = {
        role: scoring.scores_file(folder).with_name("predictions.parquet")
        for role, scoring in scorings.items()
    }
    paired = [
        test_pair(running, (files["winner"], files[role]), ("winner", role), metric)
        for role in ("base", "default")
        if role in files and files[role] != files["winner"]
        for metric in experiment.evaluation.metrics
    ]
    roles = {role: scoring.trial_id for role, scoring in scorings.items()}
    return roles, adjusted(paired), score_guard(running, scorings)


def _replicates(running: Session, tops: list[Candidate]) -> list[Replicate]:
    """Train the best recipes with other seeds, all executors at once."""
    experiment = running.experiment
    sweep = experiment.sweep
    seeds = [experiment.seed + sweep.seeds + number for number in range(sweep.num_replicates)]
    clones = [entry.trial.trial_id for entry in tops if entry.trial.origin is not None]
    if seeds and clones:
        running.monitor.say(
            f"not trained again with other seeds: {', '.join(clones)}, a clone's recipe alone does "
            "not give its score"
        )
    own = [entry for entry in tops if entry.trial.origin is None]
    pairs = [(entry, seed) for entry in own for seed in seeds]
    jobs = []
    for entry, seed in pairs:
        name = f"{entry.trial.trial_id}/seed-{seed}"
        jobs.append(Job(name, "trial", name, {**entry.trial.recipe, "seed": seed}))
    if jobs:
        names = ", ".join(entry.trial.trial_id for entry in own)
        running.monitor.say(f"training again with the seeds {seeds}: {names}")
    for job in jobs:
        ray.get(running.board.submit.remote(job))
    found = []
    for (entry, seed), job in zip(pairs, jobs, strict=True):
        value, failure, done = None, None, False
        while not done:
            report = ray.get(running.board.next_report.remote(job.job_id))
            done, failure = bool(report["done"]), report.get("message")
            for note in report.get("notes", ()):
                running.ledger.append("noted", trial_id=job.job_id, message=note)
                running.monitor.say(f"{job.job_id}: {note}")
            if report.get("step") == entry.step:
                value = float(report[experiment.metric])
        found.append(Replicate(seed, value, failure, entry.trial.trial_id))
    return found


def _write_best(running: Session, winner: Candidate) -> None:
    """`best/`: the adapter in PEFT's format, the processor, the card, the experiment."""
    folder, experiment = running.folder, running.experiment
    best = folder.best
    shutil.rmtree(best, ignore_errors=True)
    best.mkdir(parents=True)
    source = folder.trial(winner.trial.trial_id).checkpoint(winner.step)
    write_adapter(source, experiment.model, best)
    evaluation = folder.trial(winner.trial.trial_id).evaluation("report", winner.step)
    shutil.copytree(evaluation, best / "evaluation")
    own = own_experiment(experiment, winner.trial.recipe, "best")
    origins = {name: s.origin for name, s in running.states.items() if s.origin is not None}
    legs = lineage(winner.trial.trial_id, winner.trial.recipe, origins)
    write_text(best / "experiment.yaml", caution(legs) + render(own))
