"""Sums by group, resamples of groups, percentiles: what intervals and tests are made from.

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

Floats = NDArray[np.float64]
Mode = Literal["max", "min"]
Combine = Callable[[Floats], Floats]
"""Totals [..., K] -> scores [...]."""

SAME = 1e-8
"""Scores closer than this are equal; BLEU adds constants to its counts, so that 0 is 1e-17."""
_BLOCK = 4_000_000
"""The most numbers that a block of resamples holds (32 MB)."""


def by_group(
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


def scored_groups(sums: Floats) -> Floats:
    """The groups in which at least one trial has a score."""
    return sums[sums.any(axis=(1, 2))]


def blocks(num_resamples: int, num_groups: int) -> Iterator[int]:
    """Sizes that add up to `num_resamples`, each small enough for `_BLOCK`."""
    size = max(1, _BLOCK // max(num_groups, 1))
    for start in range(0, num_resamples, size):
        yield min(size, num_resamples - start)


def group_draws(num_groups: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each group is drawn: blocks [b, G], B rows in all, each row adding up to G."""
    generator = np.random.default_rng(seed)
    for size in blocks(num_resamples, num_groups):
        drawn = generator.integers(0, num_groups, (size, num_groups))
        drawn += np.arange(size)[:, None] * num_groups
        counts = np.bincount(drawn.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups).astype(float)


def ratio(totals: Floats) -> Floats:
    """The first of two sums over the second; nan for 0 / 0."""
    above, below = totals[..., 0], totals[..., 1]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def totals_of(draws: Floats, sums: Floats) -> Floats:
    """The total [b, T, K] when group g counts `draws[:, g]` times."""
    return (draws @ sums.reshape(len(sums), -1)).reshape(len(draws), *sums.shape[1:])


def scores_of(draws: Floats, sums: Floats, score: Combine) -> Floats:
    """The metric of every trial [b, T]; nan where no sample has a score."""
    totals = totals_of(draws, sums)
    return np.where(totals.any(axis=-1), score(totals), np.nan)


def resampled_scores(sums: Floats, score: Combine, num_resamples: int, seed: int) -> Floats:
    """The metric of every trial in every bootstrap resample, [B, T]."""
    parts = (scores_of(draws, sums, score) for draws in group_draws(len(sums), num_resamples, seed))
    return np.concatenate(list(parts))


def percentiles(scores: Floats, confidence: float) -> tuple[float, float]:
    """The central percentiles of the resampled scores, without those that have no score."""
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    lower, upper = np.quantile(scores[~np.isnan(scores)], tails)
    return float(lower), float(upper)
