"""The smallest difference between two systems that a split can be expected to show."""

import math
from statistics import NormalDist

POWER = 0.8
"""In so many of the cases in which the difference is there, it shall be found."""


def detectable_difference(
    num_groups: int,
    *,
    confidence: float,
    mode: str = "max",
    value: float | None = None,
    standard_error: float | None = None,
    pilot_groups: int | None = None,
    is_share: bool = True,
) -> float:
    """The true difference that a paired test on `num_groups` groups finds with `POWER`.

    `difference = (z(1 - alpha / 2) + z(power)) * sqrt(variance / groups)` (Cohen 1988, chapter 2;
    Card et al. 2020 for models of language), with the variance of a group's difference as the sum
    of those of the two systems: their scores are taken as uncorrelated. Where they go together,
    as those of a model before and after tuning do, smaller differences are found.

    Of shares one sample more, `1 / groups`, is asked for: counts are whole, and exact tests of them
    keep below their level (the continuity correction; Fleiss, Levin and Paik 2003, section 4.2).

    - Without a pilot (`value` and `standard_error` of one system on `pilot_groups` groups) the
      score is taken as a share and both variances as 1/4, the largest there is.
    - With one, the first variance is the pilot's. Of a share the second is that of a share which
      is better by the difference, times the first over its own binomial variance: a base model
      that gets nothing right has no variance, the tuned one has. Otherwise both are equal.

    Parameters
    ----------
    is_share
        Whether the metric is a mean of values in [0, 1].

    Returns
    -------
    float
        At most 1 for a share.
    """
    quantile = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(POWER)
    if value is None or standard_error is None or pilot_groups is None:
        return min(1.0, quantile * math.sqrt(0.5 / num_groups) + 1 / num_groups)
    first = standard_error**2 * pilot_groups
    if not is_share or not 0 <= value <= 1:
        return quantile * math.sqrt(2 * first / num_groups)
    spread = value * (1 - value)
    scale = first / spread if spread > 0 and first > 0 else 1.0
    sign = 1.0 if mode == "max" else -1.0

    def excess(difference: float) -> float:
        """Positive where `difference` is more than what is needed to find it."""
        other = min(max(value + sign * difference, 0.0), 1.0)
        variance = first + scale * other * (1 - other)
        return difference - quantile * math.sqrt(variance / num_groups) - 1 / num_groups

    low, high = 0.0, 1.0
    if excess(high) < 0:
        return 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return high
