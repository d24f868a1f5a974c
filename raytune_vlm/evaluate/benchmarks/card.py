"""The card: what a model scored on benchmarks, one row a metric, as text, Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune_vlm.records import Scores

HEADER = (
    "benchmark",
    "metric",
    "score",
    "interval",
    "n",
    "groups",
    "left out",
    "not parsed",
    "truncated",
    "seconds",
)
DRAWN = "drawn fixtures"
"""`data` of the facts of a benchmark whose rows are the package's own."""

_LEFT = 2
"""So many columns are aligned on the left."""


@dataclass(frozen=True)
class CardRow:
    """One metric of one benchmark."""

    benchmark: str
    metric: str
    value: float | None
    """None where there is no score: secret answers, or no sample of the metric's kind."""
    lower: float | None
    upper: float | None
    num_samples: int
    num_groups: int
    left_out: int
    """Rows that could not be asked: refused, or too long."""
    parse_failure_rate: float
    truncation_rate: float
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """As shown."""
        has = self.value is not None and math.isfinite(self.value)
        return (
            self.benchmark,
            self.metric,
            f"{self.value:.4f}" if has else "-",
            f"[{self.lower:.4f}, {self.upper:.4f}]" if has else "-",
            str(self.num_samples),
            str(self.num_groups),
            str(self.left_out),
            f"{self.parse_failure_rate:.1%}",
            f"{self.truncation_rate:.1%}",
            f"{self.seconds:.1f}",
        )


@dataclass(frozen=True)
class Card:
    """A model's scores on benchmarks, and what has to be said beside them."""

    model: str
    trial_id: str
    step: int
    confidence: float
    rows: tuple[CardRow, ...]
    notes: tuple[str, ...]
    by_category: dict[str, dict[str, Any]]

    def text(self) -> str:
        """The table for a terminal."""
        lines = [HEADER, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(
                cell.ljust(width) if place < _LEFT else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", *shown, *(f"* {note}" for note in self.notes)])

    def markdown(self) -> str:
        """The table, and the scores of categories, for a README."""
        lines = [
            f"# {self.title}",
            "",
            *_table(HEADER, [row.cells() for row in self.rows], _LEFT),
            "",
            *(f"- {note}" for note in self.notes),
        ]
        split = [
            (name, metric, category, f"{entry['value']:.4f}", str(entry["num_samples"]))
            for name, metrics in self.by_category.items()
            for metric, categories in metrics.items()
            for category, entry in categories.items()
        ]
        if split:
            header = ("benchmark", "metric", "category", "score", "n")
            lines += ["", *_table(header, split, 3)]
        return "\n".join(lines) + "\n"

    @property
    def title(self) -> str:
        """Which model, and at which level the intervals are."""
        trained = f", {self.trial_id} at step {self.step}" if self.step else ""
        adapted = f", {self.trial_id}" if self.trial_id.startswith("adapter-") else ""
        return f"{self.model}{trained}{adapted}: benchmarks, {self.confidence:.0%} intervals"

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def make_card(model: str, scores: Sequence[Scores], confidence: float) -> Card:
    """The card of one checkpoint's scores, in their order."""
    rows, notes, categories = [], [], {}
    for entry in scores:
        facts = entry.benchmark
        left_out = int(facts["quarantined"]) + int(facts["over_long"])
        for metric in list(entry.metrics) or ["no answers"]:
            estimate = entry.metrics.get(metric)
            rows.append(
                CardRow(
                    benchmark=entry.split,
                    metric=metric,
                    value=estimate.value if estimate else None,
                    lower=estimate.lower if estimate else None,
                    upper=estimate.upper if estimate else None,
                    num_samples=entry.num_samples,
                    num_groups=entry.num_groups,
                    left_out=left_out,
                    parse_failure_rate=entry.parse_failure_rate,
                    truncation_rate=entry.truncation_rate,
                    seconds=entry.seconds,
                )
            )
        notes += _notes(entry)
        if entry.by_category:
            categories[entry.split] = {
                metric: {name: asdict(score) for name, score in found.items()}
                for metric, found in entry.by_category.items()
            }
    drawn = [entry.split for entry in scores if entry.benchmark["data"] == DRAWN]
    if drawn:
        notes.insert(0, f"drawn fixtures, which say nothing of a model: {', '.join(drawn)}")
    first = scores[0]
    return Card(
        model, first.trial_id, first.step, confidence, tuple(rows), tuple(notes), categories
    )


def _notes(scores: Scores) -> list[str]:
    """What makes a score another than the one of the whole benchmark."""
    facts, name = scores.benchmark, scores.split
    notes = []
    if facts["quarantined"]:
        reason = next(iter(facts["reasons"]))
        notes.append(f"{name}: {facts['quarantined']} rows were refused, the first: {reason}")
    if facts["over_long"]:
        notes.append(f"{name}: {facts['over_long']} prompts were too long")
    if facts["limit"]:
        notes.append(
            f"{name}: {scores.num_samples} questions of {facts['num_rows']}, a fixed choice"
        )
    elif facts["num_whole"] not in (None, facts["num_rows"]):
        notes.append(
            f"{name}: {facts['num_rows']} rows, but the benchmark has {facts['num_whole']}"
        )
    if not scores.metrics:
        notes.append(f"{name}: the answers are secret; submission.json is for its server")
    return notes


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], num_left: int) -> list[str]:
    marks = ["---" if place < num_left else "---:" for place in range(len(header))]
    rows = [header, marks, *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
