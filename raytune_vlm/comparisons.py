"""A score beside what it is compared with: `controls.json` and `robustness.json` of an evaluation.

evaluations/<split>/step_000200/
  controls.json                 `Comparisons` with the controls
  controls/blank_image/         predictions.parquet and scores.json of one of them
  robustness.json               `Comparisons` with altered images
  robustness/jpeg_quality=50/   the same of one of those
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_vlm.records import PairedTest, as_record

CONTROLS_FILE = "controls.json"
ROBUSTNESS_FILE = "robustness.json"


@dataclass(frozen=True)
class Comparison:
    """A checkpoint on its own prompts and on altered ones, on the same samples."""

    name: str
    """`blank_image`, or `jpeg_quality=50`."""
    num_samples: int = 0
    """Samples that both were scored on."""
    plain: dict[str, float] = field(default_factory=dict)
    """Metric -> score on the samples as they are."""
    altered: dict[str, float] = field(default_factory=dict)
    """Metric -> score on the altered ones."""
    tests: dict[str, PairedTest] = field(default_factory=dict)
    """Metric -> altered minus plain, with its interval."""
    skipped: str | None = None
    """Why there is nothing of this."""


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of one kind, in the order of the experiment file."""

    entries: list[Comparison]
    notes: list[str] = field(default_factory=list)
    """What a reader of the score has to know."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Comparisons:
        return as_record(cls, value)
