"""What the best of many trials is worth, and which trials cannot be told from it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.statistics.groups import (
    Combine,
    Floats,
    Mode,
    by_group,
    group_draws,
    percentiles,
    ratio,
    resampled_scores,
    scored_groups,
    scores_of,
)
from raytune_vlm.evaluate.statistics.intervals import unknown
from raytune_vlm.records import MetricEstimate


def corrected_winner(
    values: ArrayLike,
    weights: ArrayLike,
    groups: Sequence[str],
    *,
    mode: Mode,
    confidence: float,
    num_bootstrap: int,
    seed: int,
    combine: Combine | None = None,
    teams: Sequence[Sequence[int]] | None = None,
) -> MetricEstimate:
    """What the best of many trials is worth, without the gain from having been picked.

    BBC-CV of Tsamardinos, Greasidou and Borboudakis 2018, "Bootstrapping the out-of-sample
    predictions for efficient and accurate cross-validation", Machine Learning 107: in every
    resample the trial that is best on the drawn groups is scored on the groups that were not
    drawn. The value is the mean of these scores and the interval holds their percentiles. Both err
    on the side of caution: selection sees fewer distinct groups, and each score comes from about
    37 % of them. The standard error is the standard deviation of the scores.

    `teams`: trials (by index) that are picked together: the team with the best mean score first,
    then the best trial of that team, in every resample again. Who is in none cannot be picked.
    None: each trial stands for itself.

    With one group nothing is left to score on: the naive score within [0, 1], as `estimate` does.

    Raises
    ------
    EvaluationError
        No trial has a scored sample, or lengths differ.
    """
    sums, score = scored_groups(by_group(values, weights, groups, combine)), combine or ratio
    if not len(sums):
        raise EvaluationError("no trial has a scored sample")
    sign = 1.0 if mode == "max" else -1.0
    if len(sums) == 1:
        return unknown(float(sign * np.nanmax(sign * scores_of(np.ones((1, 1)), sums, score))))
    parts = []
    for draws in group_draws(len(sums), num_bootstrap, seed):
        inside = sign * scores_of(draws, sums, score)
        inside = np.where(np.isnan(inside), -np.inf, inside)
        if teams is not None:
            best = np.stack([inside[:, team].mean(axis=1) for team in teams]).argmax(axis=0)
            member = np.zeros((len(teams), inside.shape[1]), dtype=bool)
            for place, team in enumerate(teams):
                member[place, team] = True
            inside = np.where(member[best], inside, -np.inf)
        picked = inside.argmax(axis=1)
        outside = scores_of((draws == 0).astype(float), sums, score)
        parts.append(outside[np.arange(len(picked)), picked])
    scores = np.concatenate(parts)
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        raise EvaluationError(f"no resample of {len(sums)} groups left a scored group out")
    value = float(scores.mean())
    lower, upper = percentiles(scores, confidence)
    return MetricEstimate(value, min(lower, value), max(upper, value), float(scores.std()))


def indistinguishable(
    values: ArrayLike,
    weights: ArrayLike,
    groups: Sequence[str],
    *,
    winner: int,
    mode: Mode,
    confidence: float,
    num_bootstrap: int,
    seed: int,
    combine: Combine | None = None,
) -> list[int]:
    """The trials, by index and with the winner, that cannot be told from the winner.

    Multiple comparisons with the best (Hsu 1984; 1996, "Multiple Comparisons"), by bootstrap: a
    trial is told apart when its paired difference from the winner, over the standard error of that
    difference, exceeds the `confidence` quantile of the largest such ratio over *all* trials under
    resampling. So the truly best trial stays in the list in about `confidence` of all sweeps,
    although the winner was picked by its score; plain intervals at the same level, one a trial,
    would drop it more and more often the more trials there are. With one group nobody is told
    apart; a trial without any score is.

    Raises
    ------
    EvaluationError
        `winner` is not a row with a scored sample, or lengths differ.
    """
    sums, score = by_group(values, weights, groups, combine), combine or ratio
    sign = 1.0 if mode == "max" else -1.0
    scores = sign * scores_of(np.ones((1, len(sums))), sums, score)[0]
    if not 0 <= winner < len(scores) or np.isnan(scores[winner]):
        raise EvaluationError(f"trial {winner} of {len(scores)} has no score to compare with")
    scored = np.flatnonzero(~np.isnan(scores))
    if len(scored_groups(sums)) == 1:
        return [int(trial) for trial in scored]
    resampled = resampled_scores(sums[:, scored], score, num_bootstrap, seed)
    deviations = sign * resampled - scores[scored]
    deviations = deviations[~np.isnan(deviations).any(axis=1)]
    best = int(np.flatnonzero(scored == winner)[0])
    kept = []
    for column, trial in enumerate(scored):
        margin = _margin(deviations - deviations[:, [column]], best, confidence)
        if trial == winner or scores[winner] - scores[trial] <= margin:
            kept.append(int(trial))
    return kept


def _margin(deviations: Floats, best: int, confidence: float) -> float:
    """By how much one column may lead in `deviations` [B, T] (of trials from one) by chance alone.

    The quantile of the largest deviation in units of its standard error, times that of `best`.
    """
    errors = deviations.std(axis=0)
    constant = errors < 1e-12
    ratios = np.where(constant, 0.0, deviations / np.where(constant, 1.0, errors))
    return float(np.quantile(ratios.max(axis=1), confidence) * errors[best] + 1e-12)
