"""Which of the varied keys went with good scores: PED-ANOVA, as Optuna has it.

Watanabe, Bansal and Hutter (2023), "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance
in Arbitrary Subspaces", https://arxiv.org/abs/2304.10255, with the extension for keys that only
some trials have (https://arxiv.org/abs/2601.20800): how far the values of the best quarter of the
trials are from the values of all. The study is built from the trials' records, so that a copied
folder has it without `study.db`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from raytune_vlm.report.formatting import recipe_value
from raytune_vlm.report.loading import SweepView
from raytune_vlm.report.space_plots import is_continuous, is_logarithmic

QUANTILE = 0.25
MIN_TRIALS = 8
"""Below this, the best quarter is a single trial: nothing is computed."""
ENOUGH_TRIALS = 20
"""Below this, the best quarter is fewer than the five trials that Optuna asks for."""


@dataclass(frozen=True)
class KeyImportance:
    """One varied key: its share of the whole, and the trials that it was judged on."""

    key: str
    share: float
    num_trials: int
    num_values: int


@dataclass(frozen=True)
class Importance:
    """The keys, the most important first, and how far to trust the order."""

    keys: list[KeyImportance]
    num_trials: int
    num_best: int
    warning: str


def importance(view: SweepView) -> Importance | None:
    """Shares of the varied keys; without any where there are too few trials; None for no key."""
    scored = [(t, best[1].value) for t in view.trials if (best := view.best(t))]
    if not view.varied_keys or not scored:
        return None
    number = len(scored)
    num_best = math.ceil(QUANTILE * number)
    if number < MIN_TRIALS:
        text = f"{number} trials with a score are too few: at least {MIN_TRIALS} are needed."
        return Importance([], number, num_best, text)
    # A replicate's seed is varied, but nobody can choose it.
    columns = {key: _column(view, key) for key in view.varied_keys if key != "seed"}
    columns = {key: column for key, column in columns.items() if len(set(column.values())) > 1}
    shares = _shares(view, columns, {trial.trial_id: score for trial, score in scored})
    total = sum(shares.values())
    keys = [
        KeyImportance(key, share / total if total else 0.0, len(column), len(set(column.values())))
        for key, share in shares.items()
        for column in [columns[key]]
    ]
    keys.sort(key=lambda entry: -entry.share)
    text = ""
    if number < ENOUGH_TRIALS:
        text = (
            f"Only {number} trials: the best quarter is {num_best}. With fewer than "
            f"{ENOUGH_TRIALS} the order is mostly chance."
        )
    return Importance(keys, number, num_best, text)


def _column(view: SweepView, key: str) -> dict[str, Any]:
    """Trial with a score and that key -> its value, numbers where the key is a range."""
    values = {
        trial.trial_id: trial.record.recipe[key]
        for trial in view.trials
        if key in trial.record.recipe and view.best(trial)
    }
    if is_continuous(view, key, list(values.values())):
        return {trial_id: float(value) for trial_id, value in values.items()}
    return {trial_id: recipe_value(value) for trial_id, value in values.items()}


def _shares(
    view: SweepView, columns: dict[str, dict[str, Any]], scores: dict[str, float]
) -> dict[str, float]:
    """Key -> PED-ANOVA's importance, not normalised."""
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
    )

    distributions: dict[str, BaseDistribution] = {}
    for key, column in columns.items():
        values = list(column.values())
        if isinstance(values[0], float):
            log = is_logarithmic(view, key, values)
            distributions[key] = FloatDistribution(min(values), max(values), log=log)
        else:
            distributions[key] = CategoricalDistribution(list(dict.fromkeys(values)))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize" if view.mode == "max" else "minimize")
    finally:
        optuna.logging.set_verbosity(verbosity)
    for trial_id, score in scores.items():
        own = {key: column[trial_id] for key, column in columns.items() if trial_id in column}
        study.add_trial(
            optuna.trial.create_trial(
                params=own, distributions={key: distributions[key] for key in own}, value=score
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=QUANTILE)
    with warnings.catch_warnings():
        # It warns of few trials, which the page tells in its own words.
        warnings.simplefilter("ignore")
        return evaluator.evaluate(study, list(columns))
