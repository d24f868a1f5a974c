"""The data section: the account of every split, lengths in tokens, overlaps, what was refused.

A manifest of an earlier version lacks some figures: those are told as missing, not as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from raytune_vlm.records import DataManifest, SplitStatistics
from raytune_vlm.report.canvas import (
    BASE,
    INK,
    QUIET,
    Plot,
    canvas,
    is_number,
    legend_above,
)
from raytune_vlm.report.formatting import count, percent
from raytune_vlm.report.loading import SweepView, lookup

MAX_REASONS = 10

TIER = {
    "pixels": "prepared as the model takes them, read without any work",
    "encoded": "the files as they came, decoded by threads of the worker while training",
}
CONSUMPTION = {
    "cached": "read from the memory-mapped store",
    "streaming": "Ray Data ships the encoded images from where the store is",
}
KINDS = {
    "group": "same group",
    "image": "same image",
    "near_image": "nearly the same image",
    "text": "same words",
}
OVER_LONG = {
    "drop": "a longer sample is dropped",
    "truncate": "a longer training sample is cut at its end, where that leaves something to learn",
    "error": "a longer sample ends the sweep",
}


@dataclass(frozen=True)
class SplitView:
    """The account of one split: seen = used + quarantined + over-long + duplicates removed."""

    name: str
    statistics: SplitStatistics
    balances: bool
    histogram: Plot | None


@dataclass(frozen=True)
class Overlap:
    """How many samples of a split share a group or images with another one."""

    split: str
    other: str
    number: int
    text: str


@dataclass(frozen=True)
class Reason:
    """A reason of quarantine, how many samples it refused, and where the first of them stands."""

    text: str
    number: int
    example: str | None


@dataclass(frozen=True)
class Way:
    """One choice of how images and samples reach the workers, and why it was made."""

    label: str
    name: str
    text: str
    reason: str


@dataclass(frozen=True)
class DataSection:
    """What the section shows of a manifest."""

    splits: list[SplitView]
    is_old: bool
    """Written before truncation, duplicates, image tokens and the tier were recorded."""
    limit: int | None
    over_long: str
    ways: list[Way]
    overlaps: list[Overlap]
    reasons: list[Reason]
    num_more_reasons: int
    num_more_refused: int
    """Samples that the reasons which are not listed refused."""


def data_section(view: SweepView) -> DataSection | None:
    """The section's content; None while the data has not been prepared."""
    manifest = view.manifest
    if manifest is None:
        return None
    limit = lookup(view.experiment, "data.max_length")
    limit = limit if isinstance(limit, int) else None
    tops = [e.length_edges[-1] for e in manifest.splits.values() if _can_be_drawn(e)]
    reasons = [
        Reason(text, number, _first_origin(view, text))
        for text, number in manifest.quarantine_reasons.items()
    ]
    return DataSection(
        splits=[
            SplitView(name, entry, _balances(entry), _histogram(name, entry, max(tops), limit))
            if _can_be_drawn(entry)
            else SplitView(name, entry, _balances(entry), None)
            for name, entry in manifest.splits.items()
        ],
        is_old=_is_old(manifest),
        limit=limit,
        over_long=OVER_LONG.get(str(lookup(view.experiment, "data.over_long")), ""),
        ways=[] if _is_old(manifest) else _ways(view, manifest),
        overlaps=_overlaps(manifest),
        reasons=reasons[:MAX_REASONS],
        num_more_reasons=len(reasons[MAX_REASONS:]),
        num_more_refused=sum(reason.number for reason in reasons[MAX_REASONS:]),
    )


def _is_old(manifest: DataManifest) -> bool:
    return not manifest.tier_reason


def _ways(view: SweepView, manifest: DataManifest) -> list[Way]:
    consumption = str(lookup(view.experiment, "data.consumption"))
    tier = Way("Images", manifest.tier, TIER.get(manifest.tier, ""), manifest.tier_reason)
    if consumption not in CONSUMPTION:
        return [tier]
    text = CONSUMPTION[consumption]
    return [tier, Way("Samples", consumption, text, "as data.consumption says")]


def _balances(entry: SplitStatistics) -> bool:
    accounted = entry.num_used + entry.num_quarantined + entry.num_dropped_over_long
    accounted += entry.num_duplicates
    return accounted == entry.num_seen


def _first_origin(view: SweepView, reason: str) -> str | None:
    return next((row.origin for row in view.quarantined if row.reason == reason), None)


def _overlaps(manifest: DataManifest) -> list[Overlap]:
    """Every pair of splits that hold samples; the manifest leaves out pairs without overlap."""
    if _is_old(manifest):  # it counted groups and equal samples, and listed zeros
        pairs = (pair.partition("/") for pair in manifest.overlap)
        numbers = manifest.overlap.values()
        return [
            Overlap(second, first, number, f"{count(number)} groups or samples")
            for (first, _, second), number in zip(pairs, numbers, strict=True)
        ]
    used = {name: entry.num_used for name, entry in manifest.splits.items() if entry.num_used}
    found = []
    for first, second in combinations(used, 2):
        number = manifest.overlap.get(f"{first}/{second}", 0)
        text = f"{count(number)} of {count(used[second])} ({percent(number / used[second])})"
        kinds = manifest.overlap_kinds.get(f"{first}/{second}", {})
        if kinds:
            listed = (f"{KINDS.get(kind, kind)} {count(n)}" for kind, n in kinds.items())
            text += f": {', '.join(listed)}"
        found.append(Overlap(second, first, number, text))
    return found


def _can_be_drawn(entry: SplitStatistics) -> bool:
    counts, edges = entry.length_counts, entry.length_edges
    fits = len(edges) == len(counts) + 1 and all(is_number(value) for value in (*counts, *edges))
    return fits and sum(counts) > 0 and edges[-1] > 0


def _histogram(name: str, entry: SplitStatistics, top: float, limit: int | None) -> Plot:
    """Samples by length; the axis of lengths is the same for all splits, so that they compare."""
    counts, edges = entry.length_counts, entry.length_edges
    widths = [end - start for start, end in pairwise(edges)]
    with canvas(3.4, 2.3) as (figure, axes):
        axes.bar(edges[:-1], counts, widths, align="edge", color=QUIET, edgecolor="white", lw=0.6)
        axes.axvline(entry.mean_length, color=INK, linewidth=1.3, label="mean")
        if limit is not None and limit <= 1.25 * top:
            top = max(top, limit)
            line: dict[str, Any] = {"color": BASE, "linewidth": 1.1, "linestyle": (0, (5, 3))}
            axes.axvline(limit, label="data.max_length", **line)
        axes.set(xlabel="tokens", ylabel="samples", xlim=(0, 1.03 * top))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: count(float(value))))
        axes.grid(visible=False, axis="x")
        legend_above(axes)
        fullest = max(range(len(counts)), key=counts.__getitem__)
        return Plot(
            figure,
            name,
            f"Histogram of the lengths of the samples of {name} in tokens: most stand between "
            f"{count(edges[fullest])} and {count(edges[fullest + 1])}, the mean is "
            f"{count(entry.mean_length)}, the longest {count(entry.max_length)}.",
            f"n = {count(sum(counts))}",
        )
