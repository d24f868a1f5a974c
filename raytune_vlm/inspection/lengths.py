"""The figures of `stats`: images, turns, tokens, and what batches of them would waste."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raytune_vlm.inspection.rows import Checked, Row
from raytune_vlm.inspection.sample_view import format_of
from raytune_vlm.inspection.tokens import count_image_tokens

BATCH_SIZE = 8
NUM_BINS = 16


@dataclass(frozen=True)
class Spread:
    """A quantity over all samples or images."""

    minimum: float
    median: float
    mean: float
    p95: float
    p99: float
    maximum: float


@dataclass(frozen=True)
class Histogram:
    """Counts between edges."""

    edges: tuple[int, ...]
    """One more than there are counts; the last bin is closed."""
    counts: tuple[int, ...]
    open_end: bool
    """Whether the last bin also holds everything beyond its edge."""


@dataclass(frozen=True)
class Statistics:
    """What a set of image-text samples is like."""

    num_seen: int
    num_good: int
    num_bad: int
    splits: dict[str, int]
    """Good samples by the split of their source (`auto`: not named)."""
    turns: dict[int, int]
    images_per_sample: dict[int, int]
    formats: dict[str, int]
    num_images: int
    spreads: dict[str, Spread]
    """By what is measured; what no sample has is left out."""
    num_tokens: int
    max_length: int
    num_over_long: int
    histogram: Histogram | None
    padding_waste: float | None
    """Share of padding in random batches of `BATCH_SIZE`."""
    num_packed: int | None
    """Rows of `max_length` tokens that would hold all samples that fit, at best."""

    @property
    def num_text_only(self) -> int:
        """Samples without an image."""
        return self.images_per_sample.get(0, 0)


class Measures:
    """Collects the numbers of each sample as it comes: about forty bytes a sample."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._num_seen = self._num_bad = 0
        self._counters: dict[str, Counter[int]] = {"turns": Counter(), "images": Counter()}
        self._formats: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()
        self._numbers: dict[str, array[int]] = {
            name: array("q") for name in ("tokens", "image tokens", "labelled", "width", "height")
        }

    def add(self, row: Row, processor: object) -> None:
        """Measure a row; a bad one is only counted."""
        self._num_seen += 1
        if not isinstance(row, Checked):
            self._num_bad += 1
            return
        self._splits[row.split] += 1
        self._counters["turns"][len(row.sample.messages)] += 1
        self._counters["images"][len(row.sizes)] += 1
        self._formats.update(format_of(image) for image in row.sample.images)
        for width, height in row.sizes:
            self._numbers["width"].append(width)
            self._numbers["height"].append(height)
        if row.encoded is not None:
            self._numbers["tokens"].append(len(row.encoded.input_ids))
            self._numbers["image tokens"].append(count_image_tokens(row.encoded, processor))
            if not row.is_prompt:
                self._numbers["labelled"].append(row.encoded.num_labelled)

    def statistics(self) -> Statistics:
        """The figures of all rows so far."""
        width, height = self._get("width"), self._get("height")
        tokens = self._get("tokens")
        measured = {
            "tokens": tokens,
            "image tokens": self._get("image tokens"),
            "labelled tokens": self._get("labelled"),
            "image width": width,
            "image height": height,
            "megapixels": width * height / 1e6,
        }
        fitting = tokens[tokens <= self._max_length]
        return Statistics(
            num_seen=self._num_seen,
            num_good=self._num_seen - self._num_bad,
            num_bad=self._num_bad,
            splits=dict(self._splits),
            turns=dict(sorted(self._counters["turns"].items())),
            images_per_sample=dict(sorted(self._counters["images"].items())),
            formats=dict(self._formats.most_common()),
            num_images=len(width),
            spreads={name: spread(values) for name, values in measured.items() if len(values)},
            num_tokens=int(tokens.sum()),
            max_length=self._max_length,
            num_over_long=len(tokens) - len(fitting),
            histogram=histogram(tokens) if len(tokens) else None,
            padding_waste=padding_waste(fitting, BATCH_SIZE),
            num_packed=math.ceil(fitting.sum() / self._max_length) if len(fitting) else None,
        )

    def _get(self, name: str) -> np.ndarray:
        return np.array(self._numbers[name], dtype=np.int64)


def spread(values: np.ndarray) -> Spread:
    """Least, greatest and what lies between; percentiles are values that occur."""
    quantiles = np.percentile(values, (0, 50, 95, 99, 100), method="inverted_cdf")
    low, median, p95, p99, high = (float(value) for value in quantiles)
    return Spread(low, median, float(values.mean()), p95, p99, high)


def histogram(values: np.ndarray) -> Histogram:
    """At most `NUM_BINS` bins of a round width; a long tail goes into the last one."""
    low, top = int(values.min()), int(values.max())
    body = int(np.percentile(values, 99, method="inverted_cdf"))
    open_end = top > 2 * body - low
    width = _round_up(((body if open_end else top) - low + 1) / NUM_BINS)
    first = low // width * width
    count = ((body if open_end else top) - first) // width + 1
    edges = first + width * np.arange(count + 1)
    places = np.minimum((values - first) // width, count - 1)
    counts = np.bincount(places, minlength=count)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), bool(open_end))


def padding_waste(lengths: np.ndarray, batch_size: int) -> float | None:
    """Share of padding when samples are drawn at random and padded to their batch's longest."""
    if len(lengths) < batch_size:
        return None
    order = np.random.default_rng(0).permutation(lengths)
    order = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    return float(1 - order.sum() / (order.max(axis=1).sum() * batch_size))


def bars(counts: Sequence[int], width: int) -> list[str]:
    """Each count as a bar of eighths of a block, the greatest `width` characters long."""
    most = max(counts, default=0) or 1
    drawn = []
    for count in counts:
        eighths = max(round(8 * width * count / most), 1 if count else 0)
        drawn.append("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip())
    return drawn


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    if width <= 1:
        return 1
    power = 10 ** math.floor(math.log10(width))
    return int(next(step * power for step in (1, 2, 5, 10) if step * power >= width))
