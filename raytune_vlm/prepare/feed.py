"""The feed: a worker's micro-batches, step by step, cached or streamed; the same arrays either way.

`cached` reads the memory-mapped store in the training process and needs no Ray CPU. `streaming`
lets Ray Data tasks read and collate ahead of the training process, in order; they are handed the
plan's rows, so both feeds deliver the same micro-batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from raytune_vlm.collate.arrays import collate_arrays
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.prepare.plan import Plan
from raytune_vlm.prepare.store import TENSOR_TYPE, PreparedSplit, array_of, tensor_entry

Arrays = dict[str, np.ndarray]

STREAM_CPUS = 0.25
"""CPUs that Ray reserves for a task that collates ahead."""
STREAM_TASKS = 2
"""Such tasks at once for one worker."""
MICRO_BATCHES_PER_TASK = 16
"""A block of one micro-batch would cost more to hand over than to make."""


class Feed(Protocol):
    """Where a training worker gets its micro-batches."""

    def step(self, number: int) -> list[Arrays]:
        """This worker's micro-batches of optimizer step `number`, in order."""

    def close(self) -> None:
        """Let go of whatever runs ahead."""


@dataclass(frozen=True)
class Collation:
    """What turns the plan's rows into this worker's micro-batches; plain data, picklable.

    Rank r of W takes rows r, r + W, ... of a global batch, `micro_batch_size` at a time.
    """

    model_type: str
    pad_token_id: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def rows(self, plan: Plan, number: int) -> list[np.ndarray]:
        """The rows of each micro-batch of a step."""
        mine = plan.step(number)[self.rank :: self.world_size]
        size = self.micro_batch_size
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def collate(self, split: PreparedSplit, rows: np.ndarray) -> Arrays:
        """One micro-batch."""
        samples = [split.encoded(int(row)) for row in rows]
        family = FAMILIES[self.model_type]
        return collate_arrays(samples, family, pad_token_id=self.pad_token_id)


class CachedFeed:
    """Micro-batches made in this process from the memory-mapped store."""

    def __init__(self, split: PreparedSplit, plan: Plan, collation: Collation) -> None:
        self._split, self._plan, self._collation = split, plan, collation

    def step(self, number: int) -> list[Arrays]:
        """See `Feed.step`."""
        rows = self._collation.rows(self._plan, number)
        return [self._collation.collate(self._split, entry) for entry in rows]

    def close(self) -> None:
        """Nothing runs ahead."""


class StreamingFeed:
    """Micro-batches made ahead by Ray Data tasks, from the first asked step to `max_steps`."""

    def __init__(
        self, split: PreparedSplit, plan: Plan, collation: Collation, max_steps: int
    ) -> None:
        self._split, self._plan, self._collation = split, plan, collation
        self._max_steps = max_steps
        self._next: int | None = None
        self._stream: Iterator[Arrays] | None = None

    def step(self, number: int) -> list[Arrays]:
        """See `Feed.step`; a step out of order starts the stream anew."""
        if self._stream is None or number != self._next:
            self._stream = self._open(number)
        self._next = number + 1
        count = len(self._collation.rows(self._plan, number))
        return [next(self._stream) for _ in range(count)]

    def close(self) -> None:
        """Drop the stream; its tasks end."""
        self._stream = None

    def _open(self, first: int) -> Iterator[Arrays]:
        import ray.data

        context = ray.data.DataContext.get_current()
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        split, plan, collation = self._split, self._plan, self._collation
        places = [
            (step, place)
            for step in range(first, self._max_steps)
            for place in range(len(collation.rows(plan, step)))
        ]

        def make(batch: dict[str, np.ndarray]) -> pa.Table:
            column = []
            for number in batch["id"]:
                step, place = places[int(number)]
                arrays = collation.collate(split, collation.rows(plan, step)[place])
                column.append([tensor_entry(name, array) for name, array in arrays.items()])
            return pa.table({"tensors": pa.array(column, type=pa.list_(TENSOR_TYPE))})

        blocks = -(-len(places) // MICRO_BATCHES_PER_TASK)
        dataset = ray.data.range(len(places), override_num_blocks=blocks).map_batches(
            make,
            batch_size=None,
            num_cpus=STREAM_CPUS,
            compute=ray.data.TaskPoolStrategy(size=STREAM_TASKS),
        )
        for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield _arrays(table)


def _arrays(table: Any) -> Arrays:
    entries = table.column("tensors").combine_chunks()[0].values
    names = entries.field("name").to_pylist()
    # Copied: torch wants writable memory, and the block lies in Ray's shared memory.
    return {name: array_of(entries, place).copy() for place, name in enumerate(names)}
