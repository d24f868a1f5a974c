"""A worker's micro-batches, step by step: what the plan's steps become, and who makes the arrays.

Two feeds, the same arrays either way:

- `CachedFeed` where the store holds pixels (tier `pixels`): it reads them from the memory map.
- `stream.DecodingFeed` where it holds images still encoded (tier `encoded`): threads decode them
  ahead. They come from the memory map (`data.consumption: cached`) or through Ray Data
  (`streaming`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import numpy as np

from raytune_vlm.collate.arrays import IGNORED, collate_arrays
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.packed import joined
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.prepare.plan import Plan, micro_batches
from raytune_vlm.prepare.store import PreparedSplit

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes."""

    rows: tuple[int, ...]
    """The samples, by their row in the training split."""
    arrays: Arrays
    counts: bool = True
    """False for a stand-in that keeps ranks in step: nothing in it carries loss."""


@dataclass(frozen=True)
class Part:
    """The samples of a micro-batch of one rank, before they are read."""

    rows: tuple[int, ...]
    draws: tuple[int, ...]
    """The number of the unit that drew each sample, from the first step on: what is random about a
    sample hangs on it, so that no two uses of a sample are alike."""
    counts: bool = True


class Feed(Protocol):
    """Where a training worker gets its micro-batches."""

    def step(self, number: int) -> list[MicroBatch]:
        """This worker's micro-batches of optimizer step `number`, in order."""

    def close(self) -> None:
        """Let go of whatever runs ahead."""


@dataclass(frozen=True)
class Collation:
    """How the plan's steps become this worker's micro-batches; plain data, picklable.

    The micro-batches of a step are dealt out in turn: rank r of W takes the r-th, the (r + W)-th,
    and so on. Every rank does as many forward passes as the others; where the last round does not
    reach it, it repeats its last samples without loss.
    """

    model_type: str
    pad_token_id: int
    micro_batch_size: int
    micro_batch_tokens: int | None = None
    rank: int = 0
    world_size: int = 1
    packed: bool = False
    """Whether the samples of a unit share a row."""
    pad_to: int = 0
    """Least length of a micro-batch, in tokens."""
    blank: Encoded | None = None
    """What a micro-batch of text alone gets added, without loss: see `prepare.blank`."""

    def parts(self, plan: Plan, lengths: np.ndarray, number: int) -> list[Part]:
        """The micro-batches of this rank in a step."""
        units, first = plan.step(number), number * plan.spec.batch_size
        batches = self._places(units, lengths)
        rounds = -(-len(batches) // self.world_size)
        parts = []
        for place in range(self.rank, rounds * self.world_size, self.world_size):
            counts = place < len(batches)
            chosen = batches[place] if counts else batches[-1][-1:]
            rows = tuple(int(row) for unit in chosen for row in units[unit])
            draws = tuple(first + unit for unit in chosen for _ in units[unit])
            parts.append(Part(rows, draws, counts))
        return parts

    def largest(self, plan: Plan, lengths: np.ndarray, number: int) -> int:
        """Units of the largest micro-batch of a step, on whichever rank it is."""
        return max(map(len, self._places(plan.step(number), lengths)))

    def _places(self, units: list[np.ndarray], lengths: np.ndarray) -> list[list[int]]:
        return micro_batches(
            units,
            lengths,
            world_size=self.world_size,
            max_units=self.micro_batch_size,
            max_tokens=self.micro_batch_tokens,
        )

    def collate(self, part: Part, samples: Sequence[Encoded]) -> MicroBatch:
        """The micro-batch of the samples of a part."""
        family = FAMILIES[self.model_type]
        rows = list(samples)
        if self.packed:
            units = groupby(zip(part.draws, samples, strict=True), key=itemgetter(0))
            rows = [joined([sample for _, sample in unit], family) for _, unit in units]
        if self.blank is not None and not any("pixel_values" in row.tensors for row in samples):
            rows.append(joined([self.blank], family) if self.packed else self.blank)
        arrays = collate_arrays(rows, family, pad_token_id=self.pad_token_id, pad_to=self.pad_to)
        if not part.counts:
            arrays["labels"].fill(IGNORED)
        return MicroBatch(part.rows, arrays, part.counts)


class CachedFeed:
    """Micro-batches made in this process from the memory-mapped store."""

    def __init__(self, split: PreparedSplit, plan: Plan, collation: Collation) -> None:
        self._split, self._plan, self._collation = split, plan, collation

    def step(self, number: int) -> list[MicroBatch]:
        """See `Feed.step`."""
        split = self._split
        return [
            self._collation.collate(part, [split.encoded(row) for row in part.rows])
            for part in self._collation.parts(self._plan, split.lengths, number)
        ]

    def close(self) -> None:
        """Nothing runs ahead."""
