"""The score of each category of samples, and of the groups that a benchmark makes of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytune_vlm.evaluate.metrics import Metric, SampleScore
from raytune_vlm.records import CategoryScore

Floats = NDArray[np.float64]


def statistics_of(metric: Metric, results: Sequence[SampleScore]) -> tuple[Floats, Floats]:
    """The values [S], or the sums [S, K] of a metric with `combine`, and the weights [S]."""
    entries = [result.sums if metric.combine else result.value for result in results]
    return np.array(entries, dtype=float), np.array([result.weight for result in results])


def category_scores(
    metric: Metric, values: Floats, weights: Floats, categories: Sequence[str]
) -> dict[str, CategoryScore]:
    """The metric on the samples of each category and of each of `metric.groups`, by name.

    Groups come first, in their order; one of which there is no sample is left out, and so is a
    category none of whose samples has a score. Samples without a category are in none. A group
    counts every sample the same, whatever its category.

    Parameters
    ----------
    values, weights
        As `statistics_of` gives them.
    """
    names = np.array(categories, dtype=object)
    members = dict(metric.groups) | {name: (name,) for name in sorted(set(categories)) if name}
    found = {}
    for name, inside in members.items():
        chosen = np.isin(names, list(inside))
        chosen &= ~np.isnan(values).any(axis=1) if metric.combine else ~np.isnan(values)
        if chosen.any():
            score = _score(metric, values[chosen], weights[chosen])
            found[name] = CategoryScore(score, int(chosen.sum()))
    return found


def _score(metric: Metric, values: Floats, weights: Floats) -> float:
    if metric.combine:
        return float(metric.combine(values.sum(axis=0)))
    return float(np.average(values, weights=weights if weights.any() else None))
