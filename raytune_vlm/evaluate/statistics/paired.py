"""Two systems on the same samples: the paired bootstrap, the exchange test, McNemar, Holm."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.statistics.groups import (
    Combine,
    Floats,
    blocks,
    by_group,
    percentiles,
    ratio,
    resampled_scores,
    scored_groups,
    totals_of,
)
from raytune_vlm.records import PairedTest


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

    `num_samples` counts the samples that both have a score for; others are left out. Where every
    score is 0 or 1 and counts the same, `only_first` and `only_second` count the samples that only
    one gets right, and `mcnemar_p` is McNemar's exact test of them; None where a group has several
    samples, for which that test is not made.

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
    score = combine or ratio
    sums = scored_groups(by_group(value, weights, groups, combine))
    scores = score(sums.sum(axis=0))
    difference = float(scores[0] - scores[1])
    if len(sums) == 1:
        lower, upper = -1.0, 1.0
    else:
        resampled = resampled_scores(sums, score, num_bootstrap, seed)
        lower, upper = percentiles(resampled[:, 0] - resampled[:, 1], confidence)
    only = None if combine else _discordant(value, np.atleast_2d(weights).astype(float))
    alone = len(sums) == int(both.sum())
    return PairedTest(
        metric=metric,
        first=first,
        second=second,
        difference=difference,
        lower=min(lower, difference),
        upper=max(upper, difference),
        p_value=_exchange_test(sums, score, difference, num_bootstrap, seed),
        num_samples=int(both.sum()),
        only_first=only[0] if only else None,
        only_second=only[1] if only else None,
        mcnemar_p=mcnemar(*only) if only and alone else None,
    )


def _exchange_test(
    sums: Floats, score: Combine, difference: float, num_resamples: int, seed: int
) -> float:
    """The p-value of a difference between the two trials of [G, 2, K] sums; see `paired_test`."""
    num_groups = len(sums)
    complete = num_groups <= 16 and 2**num_groups <= num_resamples
    generator = np.random.default_rng([seed, 1])
    extreme = total = 0
    for size in blocks(2**num_groups if complete else num_resamples, num_groups):
        if complete:
            stay = (np.arange(size)[:, None] >> np.arange(num_groups)) & 1
        else:
            stay = generator.integers(0, 2, (size, num_groups))
        kept = stay.astype(float)
        exchanged = score(totals_of(kept, sums) + totals_of(1 - kept, sums[:, ::-1]))
        gaps = np.abs(exchanged[:, 0] - exchanged[:, 1])
        extreme += int((gaps >= abs(difference) - 1e-12).sum())
        total += int((~np.isnan(gaps)).sum())
    return extreme / total if complete else (1 + extreme) / (1 + total)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947) for samples that only one gets right.

    Twice the smaller tail of a binomial with one half, at most 1. It takes samples as independent,
    so it is no test for samples that come in groups.
    """
    number, fewer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(log - number * math.log(2)) for log in logs))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979), in their order.

    Rejecting those at most alpha makes any false rejection at all no likelier than alpha, whatever
    the dependence between the tests.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values, float)[order] * factors)
    return [float(value) for value in np.minimum(adjusted, 1.0)]


def _discordant(values: Floats, weights: Floats) -> tuple[int, int] | None:
    """How many samples only the first and only the second gets right; None for graded scores."""
    scored = ~np.isnan(values).any(axis=0)
    first, second = values[:, scored]
    used = weights[:, scored]
    if not np.isin(values[:, scored], (0.0, 1.0)).all() or np.ptp(used) > 0:
        return None
    return int((first > second).sum()), int((second > first).sum())
