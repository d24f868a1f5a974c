"""Where the winner gains and where it loses: `report` cut by what the records say of a sample.

By the length of the reference and of the prompt, by prompt, by how many answers are right, by
overlap with `train`, by image size and source, by category and type of the reference. A slice is
scored as the whole is: the sum of score times weight over the sum of weights. The interval of a
difference is a percentile bootstrap over groups, the same draws for winner and base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from raytune_vlm.records import BASE_TRIAL
from raytune_vlm.references import read_reference
from raytune_vlm.report.loading import SweepView
from raytune_vlm.report.predictions import predictions

MIN_GROUPS = 5
"""A slice of fewer groups is told without an interval."""
FEW_SAMPLES = 30
NUM_DRAWS = 1000
MAX_PROMPTS = 6
MAX_CATEGORIES = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """One part of `report`: what base and winner have on it."""

    cut: str
    name: str
    num_samples: int
    num_groups: int
    base: float
    winner: float
    lower: float | None
    """Of the interval of winner minus base; None for too few groups."""
    upper: float | None
    says: str

    @property
    def is_few(self) -> bool:
        return self.num_samples < FEW_SAMPLES


def slices(view: SweepView) -> list[Slice]:
    """The slices of every cut that has at least two; none without answers of winner and base."""
    if view.result is None or view.result.winner == BASE_TRIAL:
        return []
    base = predictions(view, BASE_TRIAL, None)
    winner = predictions(view, view.result.winner, view.result.winner_step)
    names = [
        name
        for name in sorted(base.keys() & winner.keys())
        if all(_is_scored(rows[name], view.metric) for rows in (base, winner))
    ]
    rows = [(base[name], winner[name]) for name in names]
    found = []
    for cut, labels in _cuts(view, [winner[name] for name in names]):
        parts = list(dict.fromkeys(sorted(labels, key=_order)))
        if len(parts) < 2:
            continue
        for part in parts:
            pairs = [pair for pair, label in zip(rows, labels, strict=True) if label == part]
            found.append(_slice(view, cut, part[1], pairs))
    return found


def _is_scored(row: Row, metric: str) -> bool:
    """Whether a row has a score of its own that counts, of a metric that is a mean of such."""
    value, weight = row.get(metric), row.get(f"{metric}/weight", 1.0)
    known = value is not None and math.isfinite(value) and weight > 0
    return known and f"{metric}/sums" not in row


Label = tuple[int, str]
"""Place among the slices of a cut, name."""


def _order(label: Label) -> int:
    return label[0]


def _cuts(view: SweepView, rows: list[Row]) -> Iterator[tuple[str, list[Label]]]:
    """Every way to cut, with a label for each row."""
    if not rows:
        return
    references = [read_reference(str(row.get("reference") or "")) for row in rows]
    yield (
        "length of the reference, in characters",
        _thirds([len(entry.answers[0]) for entry in references]),
    )
    yield "length of the prompt, in characters", _thirds([len(_prompt(row)) for row in rows])
    prompts = list(dict.fromkeys(map(_prompt, rows)))
    if len(prompts) <= MAX_PROMPTS:
        yield "prompt", [(prompts.index(_prompt(row)), _prompt(row)) for row in rows]
    several = [len(dict.fromkeys(entry.answers)) > 1 for entry in references]
    yield "right answers", [(int(many), "several" if many else "one") for many in several]
    known = [str(row["sample_id"]) in view.like_train for row in rows]
    yield "like a training sample", [(int(like), "yes" if like else "no") for like in known]
    facts = [view.facts.get(str(row["sample_id"]), {}) for row in rows]
    if all(facts):
        yield "size of the images, in pixels", _thirds([int(entry["pixels"]) for entry in facts])
        yield from _by_name("source", [str(entry["source"]) for entry in facts])
    for cut in ("category", "type"):
        yield from _by_name(cut, [str(getattr(entry, cut)) or "none" for entry in references])


def _by_name(cut: str, names: list[str]) -> Iterator[tuple[str, list[Label]]]:
    """A slice for each name, unless there are too many to read."""
    parts = sorted(set(names))
    if len(parts) <= MAX_CATEGORIES:
        yield cut, [(parts.index(name), name) for name in names]


def _prompt(row: Row) -> str:
    return str(row.get("prompt") or "")


def _thirds(sizes: list[int]) -> list[Label]:
    """Short, middle, long, with the sizes that each spans; fewer where many are the same."""
    first, second = (float(q) for q in numpy.quantile(sizes, (1 / 3, 2 / 3), method="higher"))
    places = [0 if size < first else 1 if size < second else 2 for size in sizes]
    labels = {}
    for place in set(places):
        own = [size for size, at in zip(sizes, places, strict=True) if at == place]
        labels[place] = f"{min(own):,} to {max(own):,}" if min(own) < max(own) else f"{own[0]:,}"
    return [(place, labels[place]) for place in places]


def _slice(view: SweepView, cut: str, name: str, pairs: list[tuple[Row, Row]]) -> Slice:
    groups = list(dict.fromkeys(str(winner["group_id"]) for _, winner in pairs))
    sums = numpy.zeros((len(groups), 2, 2))  # group, base or winner, weighted sum and weight
    for pair in pairs:
        place = groups.index(str(pair[1]["group_id"]))
        for side, row in enumerate(pair):
            weight = float(row.get(f"{view.metric}/weight", 1.0))
            sums[place, side] += (weight * float(row[view.metric]), weight)
    base, winner = _ratios(sums.sum(axis=0))
    lower = upper = None
    says = "few groups"
    if len(groups) >= MIN_GROUPS:
        lower, upper = _interval(sums, view.confidence)
        sign = 1 if view.mode == "max" else -1
        low, high = sorted((sign * lower, sign * upper))
        says = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    return Slice(cut, name, len(pairs), len(groups), float(base), float(winner), lower, upper, says)


def _ratios(sums: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Weighted sums over weights, along the last axis."""
    ratios: NDArray[numpy.float64] = sums[..., 0] / sums[..., 1]
    return ratios


def _interval(sums: NDArray[numpy.float64], confidence: float) -> tuple[float, float]:
    """Of winner minus base: percentiles over draws of groups with replacement."""
    number = len(sums)
    draws = numpy.random.default_rng(0).multinomial(number, [1 / number] * number, NUM_DRAWS)
    ratios = _ratios(numpy.tensordot(draws, sums, axes=1))
    tail = (1 - confidence) / 2
    lower, upper = numpy.quantile(ratios[:, 1] - ratios[:, 0], (tail, 1 - tail))
    return float(lower), float(upper)
