"""Intervals, paired tests and the correction for having picked the best of many trials.

A metric is a ratio, sum(value * weight) / sum(weight), over samples that come in groups (documents,
image families). Groups are what is drawn at random, so every resample draws whole groups. A sample
whose value is `nan` has no score and counts for nothing. All randomness comes from `seed`.

Shapes: S samples, G groups, T trials, B resamples. A matrix of values or weights is [T, S].
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytune_vlm.errors import EvaluationError
from raytune_vlm.records import MetricEstimate, PairedTest

Floats = NDArray[np.float64]
Mode = Literal["max", "min"]

_BLOCK = 4_000_000
"""The most numbers that a block of resamples holds (32 MB)."""


def estimate(
    values: ArrayLike,
    weights: ArrayLike,
    groups: Sequence[str],
    *,
    confidence: float,
    num_bootstrap: int,
    seed: int,
) -> MetricEstimate:
    """The metric on one set of samples, with an interval and a standard error.

    The interval holds the percentiles of a bootstrap over groups (Efron 1979; Field and Welsh 2007
    for clusters); with fewer than about 20 groups it tends to be too narrow. The standard error is
    that of a ratio estimator, linearised, clustered by group (Cochran 1977, sections 6.4 and 9A).

    Where resampling cannot see the uncertainty, the interval says so instead of being empty:

    - one group: [0, 1], widened to hold the value, and half of that as standard error (no variable
      in that range has more);
    - every group at 0, or every group at 1: to the exact binomial bound for G equal outcomes,
      `1 - alpha ** (1 / G)` away (Clopper and Pearson 1934); the standard error is 0.

    If all weights are 0 (`field_f1@donut` on nothing but empty documents), the samples count
    equally.

    Parameters
    ----------
    values, weights
        [S] each.
    groups
        The group of each sample.

    Raises
    ------
    EvaluationError
        No sample has a score, lengths differ, a value is infinite, or a weight is negative.
    """
    totals, counts = _by_group(values, weights, groups)
    scored = counts[:, 0] > 0
    top, bottom = totals[scored], counts[scored]
    if not len(top):
        raise EvaluationError("no sample has a score")
    value = float(_ratios(np.ones((1, len(top))), top, bottom)[0, 0])
    if len(top) == 1:
        return _unknown(value)
    lower, upper = _interval(_resampled(top, bottom, num_bootstrap, seed)[:, 0], confidence)
    reach = 1 - (1 - confidence) ** (1 / len(top))
    if (top == 0).all():
        upper = reach
    elif (top == bottom).all():
        lower = 1 - reach
    residuals = top - value * bottom
    scale = len(top) / (len(top) - 1)
    error = float(np.sqrt(scale * (residuals**2).sum()) / bottom.sum())
    return MetricEstimate(value, min(lower, value), max(upper, value), error)


def paired_test(
    values: ArrayLike,
    weights: ArrayLike,
    groups: Sequence[str],
    *,
    metric: str,
    first: str,
    second: str,
    confidence: float,
    num_bootstrap: int,
    seed: int,
) -> PairedTest:
    """Compare two systems on the same samples; rows 0 and 1 are called `first` and `second`.

    The interval of the difference (first minus second) is a percentile bootstrap over groups. The
    p-value is two-sided, from exchanging the two systems within groups at random (Fisher's
    randomisation test; Noreen 1989): (1 + exchanges at least as extreme) / (1 + B). All 2 ** G
    exchanges are taken instead, without the added 1, if they are at most B (and G at most 16). With
    one group nothing can be told: p = 1 and an interval of [-1, 1], widened to hold the difference.

    `num_samples` counts the samples that both have a score for; others are left out.

    Raises
    ------
    EvaluationError
        The matrices are not [2, S], or the two have no scored sample in common.
    """
    value = np.atleast_2d(np.asarray(values, float))
    both = ~np.isnan(value).any(axis=0)
    if len(value) != 2 or not both.any():
        raise EvaluationError(
            f"{first} and {second} need scores of {metric} on the same samples, "
            f"got {len(value)} rows with {int(both.sum())} samples in common"
        )
    top, bottom = _by_group(np.where(both, value, np.nan), weights, groups)
    top, bottom = top[bottom.any(axis=1)], bottom[bottom.any(axis=1)]
    scores = _ratios(np.ones((1, len(top))), top, bottom)[0]
    difference = float(scores[0] - scores[1])
    if len(top) == 1:
        lower, upper = -1.0, 1.0
    else:
        ratios = _resampled(top, bottom, num_bootstrap, seed)
        lower, upper = _interval(ratios[:, 0] - ratios[:, 1], confidence)
    return PairedTest(
        metric=metric,
        first=first,
        second=second,
        difference=difference,
        lower=min(lower, difference),
        upper=max(upper, difference),
        p_value=_exchange_test(top, bottom, difference, num_bootstrap, seed),
        num_samples=int(both.sum()),
    )


def corrected_winner(
    values: ArrayLike,
    weights: ArrayLike,
    groups: Sequence[str],
    *,
    mode: Mode,
    confidence: float,
    num_bootstrap: int,
    seed: int,
) -> MetricEstimate:
    """What the best of many trials is worth, without the gain from having been picked.

    BBC-CV of Tsamardinos, Greasidou and Borboudakis 2018, "Bootstrapping the out-of-sample
    predictions for efficient and accurate cross-validation", Machine Learning 107: in every
    resample the trial that is best on the drawn groups is scored on the groups that were not
    drawn. The value is the mean of these scores and the interval holds their percentiles. Both err
    on the side of caution: selection sees fewer distinct groups, and each score comes from about
    37 % of them. The standard error is the standard deviation of the scores.

    With one group nothing is left to score on: the naive score within [0, 1], as `estimate` does.

    Raises
    ------
    EvaluationError
        No trial has a scored sample, or lengths differ.
    """
    top, bottom = _by_group(values, weights, groups)
    top, bottom = top[bottom.any(axis=1)], bottom[bottom.any(axis=1)]
    if not len(top):
        raise EvaluationError("no trial has a scored sample")
    sign = 1.0 if mode == "max" else -1.0
    if len(top) == 1:
        return _unknown(float(sign * np.nanmax(sign * _ratios(np.ones((1, 1)), top, bottom))))
    parts = []
    for draws in _draws(len(top), num_bootstrap, seed):
        inside = sign * _ratios(draws, top, bottom)
        picked = np.where(np.isnan(inside), -np.inf, inside).argmax(axis=1)
        outside = _ratios((draws == 0).astype(float), top, bottom)
        parts.append(outside[np.arange(len(picked)), picked])
    scores = np.concatenate(parts)
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        raise EvaluationError(f"no resample of {len(top)} groups left a scored group out")
    value = float(scores.mean())
    lower, upper = _interval(scores, confidence)
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
    top, bottom = _by_group(values, weights, groups)
    sign = 1.0 if mode == "max" else -1.0
    scores = sign * _ratios(np.ones((1, len(top))), top, bottom)[0]
    if not 0 <= winner < len(scores) or np.isnan(scores[winner]):
        raise EvaluationError(f"trial {winner} of {len(scores)} has no score to compare with")
    scored = np.flatnonzero(~np.isnan(scores))
    if (bottom.any(axis=1)).sum() == 1:
        return [int(trial) for trial in scored]
    ratios = _resampled(top[:, scored], bottom[:, scored], num_bootstrap, seed)
    deviations = sign * ratios - scores[scored]
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


def _exchange_test(
    top: Floats, bottom: Floats, difference: float, num_resamples: int, seed: int
) -> float:
    """The p-value of a difference between the two columns of [G, 2] sums; see `paired_test`."""
    num_groups = len(top)
    complete = num_groups <= 16 and 2**num_groups <= num_resamples
    generator = np.random.default_rng([seed, 1])
    extreme = total = 0
    for size in _blocks(2**num_groups if complete else num_resamples, num_groups):
        if complete:
            stay = (np.arange(size)[:, None] >> np.arange(num_groups)) & 1
        else:
            stay = generator.integers(0, 2, (size, num_groups))
        kept = stay.astype(float)
        ratios = _ratios(kept, top, bottom, also=(1 - kept, top[:, ::-1], bottom[:, ::-1]))
        gaps = np.abs(ratios[:, 0] - ratios[:, 1])
        extreme += int((gaps >= abs(difference) - 1e-12).sum())
        total += int((~np.isnan(gaps)).sum())
    return extreme / total if complete else (1 + extreme) / (1 + total)


def _unknown(value: float) -> MetricEstimate:
    """One group: nothing is known about others."""
    lower, upper = min(0.0, value), max(1.0, value)
    return MetricEstimate(value, lower, upper, (upper - lower) / 2)


def _by_group(
    values: ArrayLike, weights: ArrayLike, groups: Sequence[str]
) -> tuple[Floats, Floats]:
    """Sums of value * weight and of weight, [G, T] each; both 0 where there is no score."""
    value, weight = np.atleast_2d(np.asarray(values, float)), np.atleast_2d(weights).astype(float)
    if value.shape != weight.shape or value.shape[1] != len(groups):
        raise EvaluationError(
            f"values {value.shape}, weights {weight.shape} and {len(groups)} groups do not fit"
        )
    scored = ~np.isnan(value)
    if np.isinf(value).any() or not (np.isfinite(weight) & (weight >= 0))[scored].all():
        raise EvaluationError("a value is infinite, or a weight is negative or not finite")
    value, weight = np.where(scored, value, 0.0), np.where(scored, weight, 0.0)
    weight = np.where(weight.any(axis=1, keepdims=True), weight, scored.astype(float))
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    top, bottom = np.zeros((2, len(names), len(value)))
    np.add.at(top, index, (value * weight).T)
    np.add.at(bottom, index, weight.T)
    return top, bottom


def _blocks(num_resamples: int, num_groups: int) -> Iterator[int]:
    """Sizes that add up to `num_resamples`, each small enough for `_BLOCK`."""
    size = max(1, _BLOCK // max(num_groups, 1))
    for start in range(0, num_resamples, size):
        yield min(size, num_resamples - start)


def _draws(num_groups: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each group is drawn: blocks [b, G], B rows in all, each row adding up to G."""
    generator = np.random.default_rng(seed)
    for size in _blocks(num_resamples, num_groups):
        drawn = generator.integers(0, num_groups, (size, num_groups))
        drawn += np.arange(size)[:, None] * num_groups
        counts = np.bincount(drawn.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups).astype(float)


def _ratios(
    draws: Floats, top: Floats, bottom: Floats, also: tuple[Floats, Floats, Floats] | None = None
) -> Floats:
    """The metric of every trial [b, T] when group g counts `draws[:, g]` times; nan for 0 / 0.

    `also` adds a second (draws, top, bottom) to numerator and denominator.
    """
    above, below = draws @ top, draws @ bottom
    if also:
        above, below = above + also[0] @ also[1], below + also[0] @ also[2]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _resampled(top: Floats, bottom: Floats, num_resamples: int, seed: int) -> Floats:
    """The metric of every trial in every bootstrap resample, [B, T]."""
    blocks = (_ratios(draws, top, bottom) for draws in _draws(len(top), num_resamples, seed))
    return np.concatenate(list(blocks))


def _interval(scores: Floats, confidence: float) -> tuple[float, float]:
    """The central percentiles of the resampled scores, without those that have no score."""
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    lower, upper = np.quantile(scores[~np.isnan(scores)], tails)
    return float(lower), float(upper)
