"""Intervals, paired tests and the correction for having picked the best of many trials.

A metric is a ratio, sum(value * weight) / sum(weight), over samples that come in groups (documents,
image families). Groups are what is drawn at random, so every resample draws whole groups. A sample
whose value is `nan` has no score and counts for nothing. All randomness comes from `seed`.

A metric that is no ratio (BLEU) comes as `combine`, from totals to the score, and its values as
what adds up over samples, with one more axis of K sums; its weights are not used.

Shapes: S samples, G groups, T trials, B resamples. A matrix of values or weights is [T, S]; sums of
a group are [G, T, K], with K = 2 (value * weight, weight) for a ratio.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytune_vlm.errors import EvaluationError
from raytune_vlm.records import MetricEstimate, PairedTest

Floats = NDArray[np.float64]
Mode = Literal["max", "min"]
Combine = Callable[[Floats], Floats]
"""Totals [..., K] -> scores [...]."""

_SAME = 1e-8
"""Scores closer than this are equal; BLEU adds constants to its counts, so that 0 is 1e-17."""
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
    combine: Combine | None = None,
) -> MetricEstimate:
    """The metric on one set of samples, with an interval and a standard error.

    The interval holds the percentiles of a bootstrap over groups (Efron 1979; Field and Welsh 2007
    for clusters); with fewer than about 20 groups it tends to be too narrow. The standard error is
    that of a ratio estimator, linearised, clustered by group (Cochran 1977, sections 6.4 and 9A);
    with `combine`, the standard deviation of the bootstrap.

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
        [S] each; with `combine` the values are [S, K].
    groups
        The group of each sample.

    Raises
    ------
    EvaluationError
        No sample has a score, lengths differ, a value is infinite, or a weight is negative.
    """
    totals, score = _by_group(values, weights, groups, combine), combine or _ratio
    sums = totals[totals[:, 0].any(axis=-1) if combine else totals[:, 0, 1] > 0]
    if not len(sums):
        raise EvaluationError("no sample has a score")
    value = float(score(sums.sum(axis=0))[0])
    if len(sums) == 1:
        return _unknown(value)
    resampled = _resampled(sums, score, num_bootstrap, seed)[:, 0]
    lower, upper = _interval(resampled, confidence)
    reach = 1 - (1 - confidence) ** (1 / len(sums))
    own = score(sums)
    if (abs(own) < _SAME).all():
        upper = reach
    elif (abs(own - 1) < _SAME).all():
        lower = 1 - reach
    error = float(resampled.std()) if combine else _ratio_error(sums[:, 0], value)
    return MetricEstimate(value, min(lower, value), max(upper, value), error)


def _ratio_error(sums: Floats, value: float) -> float:
    """The linearised standard error of a ratio of [G, 2] sums."""
    residuals = sums[:, 0] - value * sums[:, 1]
    scale = len(sums) / (len(sums) - 1)
    return float(np.sqrt(scale * (residuals**2).sum()) / sums[:, 1].sum())


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
    combine: Combine | None = None,
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
    value = np.atleast_2d(np.array(values, float))
    both = ~np.isnan(value).any(axis=(0, 2) if combine else 0)
    if len(value) != 2 or not both.any():
        raise EvaluationError(
            f"{first} and {second} need scores of {metric} on the same samples, "
            f"got {len(value)} rows with {int(both.sum())} samples in common"
        )
    value[:, ~both] = np.nan
    score = combine or _ratio
    sums = _scored(_by_group(value, weights, groups, combine))
    scores = score(sums.sum(axis=0))
    difference = float(scores[0] - scores[1])
    if len(sums) == 1:
        lower, upper = -1.0, 1.0
    else:
        resampled = _resampled(sums, score, num_bootstrap, seed)
        lower, upper = _interval(resampled[:, 0] - resampled[:, 1], confidence)
    return PairedTest(
        metric=metric,
        first=first,
        second=second,
        difference=difference,
        lower=min(lower, difference),
        upper=max(upper, difference),
        p_value=_exchange_test(sums, score, difference, num_bootstrap, seed),
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
    combine: Combine | None = None,
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
    sums, score = _scored(_by_group(values, weights, groups, combine)), combine or _ratio
    if not len(sums):
        raise EvaluationError("no trial has a scored sample")
    sign = 1.0 if mode == "max" else -1.0
    if len(sums) == 1:
        return _unknown(float(sign * np.nanmax(sign * _scores(np.ones((1, 1)), sums, score))))
    parts = []
    for draws in _draws(len(sums), num_bootstrap, seed):
        inside = sign * _scores(draws, sums, score)
        picked = np.where(np.isnan(inside), -np.inf, inside).argmax(axis=1)
        outside = _scores((draws == 0).astype(float), sums, score)
        parts.append(outside[np.arange(len(picked)), picked])
    scores = np.concatenate(parts)
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        raise EvaluationError(f"no resample of {len(sums)} groups left a scored group out")
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
    sums, score = _by_group(values, weights, groups, combine), combine or _ratio
    sign = 1.0 if mode == "max" else -1.0
    scores = sign * _scores(np.ones((1, len(sums))), sums, score)[0]
    if not 0 <= winner < len(scores) or np.isnan(scores[winner]):
        raise EvaluationError(f"trial {winner} of {len(scores)} has no score to compare with")
    scored = np.flatnonzero(~np.isnan(scores))
    if len(_scored(sums)) == 1:
        return [int(trial) for trial in scored]
    resampled = _resampled(sums[:, scored], score, num_bootstrap, seed)
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


def _exchange_test(
    sums: Floats, score: Combine, difference: float, num_resamples: int, seed: int
) -> float:
    """The p-value of a difference between the two trials of [G, 2, K] sums; see `paired_test`."""
    num_groups = len(sums)
    complete = num_groups <= 16 and 2**num_groups <= num_resamples
    generator = np.random.default_rng([seed, 1])
    extreme = total = 0
    for size in _blocks(2**num_groups if complete else num_resamples, num_groups):
        if complete:
            stay = (np.arange(size)[:, None] >> np.arange(num_groups)) & 1
        else:
            stay = generator.integers(0, 2, (size, num_groups))
        kept = stay.astype(float)
        exchanged = score(_totals(kept, sums) + _totals(1 - kept, sums[:, ::-1]))
        gaps = np.abs(exchanged[:, 0] - exchanged[:, 1])
        extreme += int((gaps >= abs(difference) - 1e-12).sum())
        total += int((~np.isnan(gaps)).sum())
    return extreme / total if complete else (1 + extreme) / (1 + total)


def _unknown(value: float) -> MetricEstimate:
    """One group: nothing is known about others."""
    lower, upper = min(0.0, value), max(1.0, value)
    return MetricEstimate(value, lower, upper, (upper - lower) / 2)


def _by_group(
    values: ArrayLike, weights: ArrayLike, groups: Sequence[str], combine: Combine | None
) -> Floats:
    """Sums [G, T, K]; all 0 where there is no score."""
    value, weight = np.atleast_2d(np.asarray(values, float)), np.atleast_2d(weights).astype(float)
    value = value[None] if combine and value.ndim == 2 else value
    if value.shape[:2] != weight.shape or weight.shape[1] != len(groups):
        raise EvaluationError(
            f"values {value.shape}, weights {weight.shape} and {len(groups)} groups do not fit"
        )
    scored = ~np.isnan(value).any(axis=2) if combine else ~np.isnan(value)
    if np.isinf(value).any() or not (np.isfinite(weight) & (weight >= 0))[scored].all():
        raise EvaluationError("a value is infinite, or a weight is negative or not finite")
    weight = np.where(scored, weight, 0.0)
    weight = np.where(weight.any(axis=1, keepdims=True), weight, scored.astype(float))
    if combine:
        entries = np.where(scored[..., None], value, 0.0)
    else:
        entries = np.stack([np.where(scored, value, 0.0) * weight, weight], axis=-1)
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), len(value), entries.shape[2]))
    np.add.at(sums, index, entries.swapaxes(0, 1))
    return sums


def _scored(sums: Floats) -> Floats:
    """The groups in which at least one trial has a score."""
    return sums[sums.any(axis=(1, 2))]


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


def _ratio(totals: Floats) -> Floats:
    """The first of two sums over the second; nan for 0 / 0."""
    above, below = totals[..., 0], totals[..., 1]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _totals(draws: Floats, sums: Floats) -> Floats:
    """The total [b, T, K] when group g counts `draws[:, g]` times."""
    return (draws @ sums.reshape(len(sums), -1)).reshape(len(draws), *sums.shape[1:])


def _scores(draws: Floats, sums: Floats, score: Combine) -> Floats:
    """The metric of every trial [b, T]; nan where no sample has a score."""
    totals = _totals(draws, sums)
    return np.where(totals.any(axis=-1), score(totals), np.nan)


def _resampled(sums: Floats, score: Combine, num_resamples: int, seed: int) -> Floats:
    """The metric of every trial in every bootstrap resample, [B, T]."""
    blocks = (_scores(draws, sums, score) for draws in _draws(len(sums), num_resamples, seed))
    return np.concatenate(list(blocks))


def _interval(scores: Floats, confidence: float) -> tuple[float, float]:
    """The central percentiles of the resampled scores, without those that have no score."""
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    lower, upper = np.quantile(scores[~np.isnan(scores)], tails)
    return float(lower), float(upper)
