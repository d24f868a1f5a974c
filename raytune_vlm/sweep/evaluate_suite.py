"""`evaluate --benchmarks`: a model, an adapter or a trial on benchmarks, and the card."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.server import ServedModel
from raytune_vlm.errors import ConfigError
from raytune_vlm.evaluate.benchmarks import Chosen
from raytune_vlm.evaluate.benchmarks.card import Card, make_card
from raytune_vlm.evaluate.benchmarks.submissions import write_submission
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import Scores, SweepFolder, read_json, write_json, write_text
from raytune_vlm.sweep import preparing, runner
from raytune_vlm.sweep.benchmarks import (
    check_adapter,
    prepare_suite,
    score_benchmarks,
    scorings_of,
    suite_of,
)
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.evaluate_served import score_served_benchmark, without_pixels
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.single import chosen as chosen_trials


def model_folder(experiment: ExperimentConfig) -> SweepFolder:
    """Where the scores of a model go that no sweep trained: `<storage>/evaluations/<model>/`."""
    name = experiment.model.name
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    if Path(name).is_dir():
        path = str(Path(name).resolve())
        slug = f"{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return SweepFolder(Path(experiment.storage_path).resolve() / "evaluations" / slug)


def evaluate_model(
    experiment: ExperimentConfig,
    chosen: Sequence[Chosen],
    *,
    adapter: Path | None = None,
    data: str | None = None,
    limit: int | None = None,
    output: Path | None = None,
    server: ServedModel | None = None,
    monitor: Monitor,
) -> Card:
    """A model by its name or folder, with an adapter on it or without.

    Parameters
    ----------
    server
        Who answers; the model's processor then only prepares the questions.

    Raises
    ------
    ConfigError, DataError, ModelError
        Model, adapter or a benchmark's data are not there.
    """
    experiment = preparing.located(experiment)
    if adapter is not None:
        adapter = check_adapter(adapter, experiment)
    folder = model_folder(experiment) if output is None else SweepFolder(output.resolve())
    if folder.experiment_file.exists():
        raise ConfigError(f"--output {output} is a sweep folder: choose another")
    scoring = runner.Scoring(None, "", 0, adapter=adapter, served=server)
    (card,) = _evaluate(experiment, folder, [scoring], chosen, data, limit, monitor)
    return card


def evaluate_trials(
    root: Path,
    trial_ids: Sequence[str],
    chosen: Sequence[Chosen],
    *,
    overrides: Any = lambda experiment: experiment,
    data: str | None = None,
    limit: int | None = None,
    trust: str | None = None,
    server: ServedModel | None = None,
    monitor: Monitor,
) -> list[Card]:
    """Trials of a sweep folder (their newest checkpoints), its winner (`best`) or its base model.

    Several share batches.

    Parameters
    ----------
    overrides
        Changes the recorded experiment: where and on what it runs.
    server
        Who answers, in the place of the base model.

    Raises
    ------
    ConfigError
        As `single.chosen`.
    """
    folder = SweepFolder(root.resolve())
    experiment = preparing.located(overrides(runner.recorded_experiment(folder, trust)))
    scorings = []
    for scoring in chosen_trials(folder, trial_ids, ""):
        trial = scoring.trial
        if trial is not None:
            # What else a recipe says is of training, and need not fit the benchmarks' data.
            recipe = {k: v for k, v in trial.recipe.items() if k == "seed" or k.startswith("lora.")}
            trial = replace(trial, recipe=recipe)
        scorings.append(replace(scoring, trial=trial, served=server))
    return _evaluate(experiment, folder, scorings, chosen, data, limit, monitor)


def _evaluate(
    experiment: ExperimentConfig,
    folder: SweepFolder,
    trials: Sequence[runner.Scoring],
    chosen: Sequence[Chosen],
    data: str | None,
    limit: int | None,
    monitor: Monitor,
) -> list[Card]:
    server = trials[0].served
    if server is not None:
        experiment = without_pixels(experiment)
    suite = suite_of(experiment, chosen, data=data, limit=limit)
    preparing.plan_of(suite.experiment)
    with Lease(folder.lease_file), ray_session(suite.experiment):
        prepared, whole = prepare_suite(suite, monitor)
        asked = [scorings_of(scoring, prepared) for scoring in trials]
        every = [each for scorings in asked for each in scorings]
        if server is not None:
            for each in every:
                score_served_benchmark(suite.experiment, folder, each, monitor)
        else:
            with runner.session(suite.experiment, folder, whole, monitor) as running:
                score_benchmarks(running, every)
        return [_card(experiment, folder, scorings) for scorings in asked]


def _card(
    experiment: ExperimentConfig, folder: SweepFolder, scorings: Sequence[runner.Scoring]
) -> Card:
    """The card of one checkpoint on all benchmarks, written beside its scores."""
    scores = []
    for each in scorings:
        file = each.scores_file(folder)
        scores.append(Scores.from_json(read_json(file)))
        if (form := scores[-1].benchmark["submission"]) is not None:
            write_submission(form, file.with_name("predictions.parquet"))
    server = scorings[0].served
    name = experiment.model.name if server is None else f"{server.model} at {server.base_url}"
    card = make_card(name, scores, experiment.evaluation.confidence)
    place = folder.trial(scorings[0].trial_id).card
    write_text(place, card.markdown())
    write_json(place.with_suffix(".json"), card.plain())
    return card
