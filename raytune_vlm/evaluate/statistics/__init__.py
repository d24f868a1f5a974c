"""Intervals, paired tests, the correction for having picked the best, and what can be detected.

The rules, their sources and how they were checked: `docs/statistics.md`.
"""

from raytune_vlm.evaluate.statistics.groups import Combine, Floats, Mode
from raytune_vlm.evaluate.statistics.intervals import estimate
from raytune_vlm.evaluate.statistics.paired import holm, mcnemar, paired_test
from raytune_vlm.evaluate.statistics.power import detectable_difference
from raytune_vlm.evaluate.statistics.winner import corrected_winner, indistinguishable

__all__ = [
    "Combine",
    "Floats",
    "Mode",
    "corrected_winner",
    "detectable_difference",
    "estimate",
    "holm",
    "indistinguishable",
    "mcnemar",
    "paired_test",
]
