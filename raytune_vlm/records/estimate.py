"""A score with what is not known about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricEstimate:
    """A metric on n samples with its interval (clustered by group when groups repeat)."""

    value: float
    lower: float
    upper: float
    standard_error: float
