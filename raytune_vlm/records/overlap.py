"""Samples of one split that are much like some of another, and scores without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raytune_vlm.records.estimate import MetricEstimate


@dataclass(frozen=True)
class CleanScores:
    """The metrics on the samples that overlap no training sample; none if all do."""

    num_samples: int
    num_groups: int
    metrics: dict[str, MetricEstimate]


@dataclass(frozen=True)
class Overlap:
    """A line of `data/overlap.jsonl`: a sample of `split` that is much like one of `with_split`."""

    split: str
    with_split: str
    kind: Literal["group", "image", "near_image", "text"]
    sample_id: str
    origin: str
    other_sample_id: str
    other_origin: str
    distance: int | None = None
    """Bits by which the hashes of the two pictures differ, of `near_image`."""
    is_counted: bool = True
    """False for the same words with other pictures: listed, but no overlap."""
