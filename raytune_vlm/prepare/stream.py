"""Micro-batches decoded while training: threads of the worker decode and collate ahead of the
optimizer what the store holds, images still encoded.

The samples come from the memory-mapped store (`cached`) or, where the worker shall not read it,
through Ray Data, in the order of the plan (`streaming`). What travels is what the JPEG file weighs
and the token ids: float pixels would be 76 times as much. The reading tasks reserve no CPU, so
trials that hold every CPU of the cluster cannot keep their own data from coming; how much they may
run ahead is bounded. A task knows the store and the plan's settings, not the plan: it works out its
steps itself, so nothing grows with the data.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from raytune_vlm.config.augmentation import AugmentationConfig
from raytune_vlm.errors import InfrastructureError
from raytune_vlm.prepare.feed import Collation, MicroBatch, Part
from raytune_vlm.prepare.holders import holders
from raytune_vlm.prepare.plan import Plan, PlanSpec
from raytune_vlm.prepare.ray_data import quiet_ray_data
from raytune_vlm.prepare.store import PreparedSplit, open_split, sample_at

STREAM_TASKS = 2
"""Reading tasks at once for one worker."""
BLOCK_BYTES = 64 * 2**20
"""About what one reading task brings, once the stream is under way; a task costs some 50 ms."""
FIRST_BLOCK_BYTES = 4 * 2**20
"""The first block is small, for somebody waits for it; each stretch then has larger ones."""
STRETCH_BLOCKS = 2
"""Blocks of one Ray Data job. One stretch is consumed while the next is read, so two of them are
what a worker holds of the object store. (A single job over all steps would do, but Ray Data's
scheduling loop spins while its consumer is the slower one: measured, a third of a core.)"""
PATIENCE = 5
"""So many times `data.stall_timeout_s` without a batch end the trial."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamSource:
    """What a reading task needs; plain data of a few hundred bytes."""

    store: str
    index_file: str
    spec: PlanSpec
    data_digest: str
    collation: Collation

    def read(self, steps: list[int]) -> pa.Table:
        """`read_steps` in a task."""
        split, plan = _opened(self.store, self.index_file, self.spec, self.data_digest)
        # In one piece: Ray would serialise a thousand slices one by one.
        return read_steps(split, plan, self.collation, steps).combine_chunks()


def read_steps(
    split: PreparedSplit, plan: Plan, collation: Collation, steps: list[int]
) -> pa.Table:
    """The samples of a rank in some steps, one a row, in order; with where each belongs."""
    pieces, places = [], []
    for step in steps:
        for number, part in enumerate(collation.parts(plan, split.lengths, step)):
            pieces.append(split.samples(part.rows))
            places += [
                (step, number, row, draw, part.counts)
                for row, draw in zip(part.rows, part.draws, strict=True)
            ]
    table = pa.concat_tables(pieces)
    for name, column in zip(_PLACE_COLUMNS, zip(*places, strict=True), strict=True):
        table = table.append_column(name, pa.array(column))
    return table


_PLACE_COLUMNS = ("step", "part", "row", "draw", "counts")


@functools.lru_cache(maxsize=2)
def _opened(
    store: str, index_file: str, spec: PlanSpec, data_digest: str
) -> tuple[PreparedSplit, Plan]:
    # Arrow's own allocators give a block's memory back at once, and fetching it anew for the next
    # block costs more than filling it.
    pa.set_memory_pool(pa.system_memory_pool())
    split = open_split(store, index_file, "train")
    plan = Plan(split.lengths, split.sources, spec, data_digest=data_digest)
    return split, plan


@dataclass(frozen=True)
class Augmenting:
    """How to change pictures, and what makes each change its own."""

    config: AugmentationConfig
    seed: int
    sample_ids: list[str]


@dataclass
class Decoding:
    """The worker's side: encoded images to a collated micro-batch."""

    collation: Collation
    maker: Any
    """The model's `collate.pixels.PixelMaker`."""
    augmenting: Augmenting | None = None

    def make(self, part: Part, located: list[Located]) -> MicroBatch:
        """Decode and collate one micro-batch."""
        samples = []
        for (batch, place), row, draw in zip(located, part.rows, part.draws, strict=True):
            sample = sample_at(batch, place)
            images = batch.column("images")[place].as_py()
            sample.tensors.update(self._pixels(images, row, draw))
            samples.append(sample)
        return self.collation.collate(part, samples)

    def _pixels(self, images: list[bytes], row: int, draw: int) -> dict[str, np.ndarray]:
        if not images:
            return {}
        made: dict[str, np.ndarray]
        if self.augmenting is None:
            made = self.maker.decode(images)
            return made
        from raytune_vlm.collate.augment import augment

        changing = self.augmenting
        pictures = [
            augment(
                Image.fromarray(pixels),
                changing.config,
                seed=changing.seed,
                sample_id=changing.sample_ids[row],
                draw=draw,
                place=place,
            )
            for place, pixels in enumerate(self.maker.open(images))
        ]
        made = self.maker.make(pictures)
        return made


Blocks = Callable[[int], Iterator[pa.Table]]
"""The tables of `read_steps` from a first step on, in order."""


class DecodingFeed:
    """Micro-batches whose images are decoded ahead, from the first step that is asked for.

    Parameters
    ----------
    blocks
        `stored_blocks` or `streamed_blocks`.
    decoding
        What the threads do with them.
    plan, lengths
        The plan and the tokens of each sample: every batch that arrives is compared with them.
    num_threads
        Threads that decode.
    stall_timeout_s
        See `data.stall_timeout_s`.
    """

    def __init__(
        self,
        blocks: Blocks,
        decoding: Decoding,
        plan: Plan,
        lengths: np.ndarray,
        *,
        num_threads: int = 1,
        stall_timeout_s: float = 120.0,
    ) -> None:
        self._blocks, self._decoding = blocks, decoding
        self._plan, self._lengths = plan, lengths
        self._num_threads, self._stall_timeout_s = num_threads, stall_timeout_s
        self._next: int | None = None
        self._ahead: _Ahead | None = None

    def step(self, number: int) -> list[MicroBatch]:
        """See `Feed.step`; a step out of order starts anew.

        Raises
        ------
        InfrastructureError
            If no batch came for a long time, or another one than the plan says.
        """
        if self._ahead is None or number != self._next:
            self.close()
            self._ahead = _Ahead(self._blocks(number), self._decoding, self._num_threads)
        self._next = number + 1
        made = []
        for part in self._decoding.collation.parts(self._plan, self._lengths, number):
            batch = self._ahead.next(self._stall_timeout_s)
            if batch.rows != part.rows:
                raise InfrastructureError(
                    f"the stream brought samples {batch.rows} where the plan has {part.rows}"
                )
            made.append(batch)
        return made

    def close(self) -> None:
        """Let go of what runs ahead; its tasks and threads end."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def stored_blocks(split: PreparedSplit, plan: Plan, collation: Collation, max_steps: int) -> Blocks:
    """Blocks that this process reads from the memory-mapped store, a step each."""

    def blocks(first: int) -> Iterator[pa.Table]:
        for step in range(first, max_steps):
            yield read_steps(split, plan, collation, [step])

    return blocks


def streamed_blocks(source: StreamSource, split: PreparedSplit, max_steps: int) -> Blocks:
    """Blocks that Ray Data tasks read, stretch by stretch."""
    units = max(1.0, source.spec.batch_size / source.collation.world_size)
    step_bytes = max(1.0, float(split.num_bytes.mean()) * units)

    def stretches(first: int) -> Iterator[list[range]]:
        size, count = FIRST_BLOCK_BYTES, 1
        while first < max_steps:
            length = max(1, int(size / step_bytes))
            end = min(first + count * length, max_steps)
            yield [range(begin, min(begin + length, end)) for begin in range(first, end, length)]
            first, size, count = end, min(4 * size, BLOCK_BYTES), STRETCH_BLOCKS

    def blocks(first: int) -> Iterator[pa.Table]:
        import ray

        ahead: queue.Queue[list[Any] | BaseException] = queue.Queue(maxsize=1)

        def read(stretch: list[range]) -> None:
            try:
                ahead.put(_read_stretch(source, stretch))
            except BaseException as error:
                ahead.put(error)

        def begin(stretch: list[range]) -> None:
            # A daemon: whoever gives up on the stream does not wait for it.
            threading.Thread(target=read, args=(stretch,), name="stretch", daemon=True).start()

        rest = stretches(first)
        upcoming = next(rest, None)
        if upcoming is not None:
            begin(upcoming)
        while upcoming is not None:
            references = ahead.get()
            if isinstance(references, BaseException):
                raise references
            upcoming = next(rest, None)
            if upcoming is not None:
                begin(upcoming)
            while references:
                yield ray.get(references.pop(0))

    return blocks


def _read_stretch(source: StreamSource, blocks: list[range]) -> list[Any]:
    """The tables of some runs of steps, as object references in order."""
    import ray.data

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        return source.read([step for number in batch["id"] for step in blocks[int(number)]])

    # From blocks that are there: a read task would ask for a CPU.
    numbers = [pa.table({"id": [number]}) for number in range(len(blocks))]
    with quiet_ray_data(in_order=True):
        dataset = ray.data.from_blocks(numbers).map_batches(
            read,
            batch_size=None,
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=min(STREAM_TASKS, len(blocks))),
        )
        references: list[Any] = dataset.materialize().to_arrow_refs()
    return references


Located = tuple[pa.RecordBatch, int]
"""A row of a record batch."""


def parts_of(table: pa.Table) -> Iterator[tuple[Part, list[Located]]]:
    """The micro-batches of a table of `read_steps`, each with where its samples lie."""
    places = [(batch, place) for batch in table.to_batches() for place in range(batch.num_rows)]
    columns = [table[name].to_pylist() for name in _PLACE_COLUMNS]
    keyed = zip(zip(*columns, strict=True), places, strict=True)
    for _, group in itertools.groupby(keyed, key=lambda entry: entry[0][:2]):
        entries, located = zip(*group, strict=True)
        _, _, rows, draws, counts = zip(*entries, strict=True)
        yield Part(rows, draws, counts[0]), list(located)


class _Ahead:
    """A thread that takes blocks and hands their micro-batches to decoding threads, a few ahead."""

    def __init__(self, blocks: Iterator[pa.Table], decoding: Decoding, num_threads: int) -> None:
        self._blocks, self._decoding = blocks, decoding
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._made: queue.Queue[Future[MicroBatch] | BaseException] = queue.Queue(
            maxsize=2 * num_threads
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pull, name="stream", daemon=True)
        self._thread.start()

    def _pull(self) -> None:
        try:
            for table in self._blocks:
                for part, located in parts_of(table):
                    if not self._put(self._pool.submit(self._decoding.make, part, located)):
                        return
            self._put(InfrastructureError("the stream has ended before the plan"))
        except BaseException as error:
            self._put(error)

    def _put(self, item: Future[MicroBatch] | BaseException) -> bool:
        """Whether there was room before the stream was closed."""
        while not self._closed.is_set():
            try:
                self._made.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def next(self, stall_timeout_s: float) -> MicroBatch:
        """The next micro-batch; says who holds what while there is none."""
        item: Future[MicroBatch] | BaseException | None = None
        for attempt in range(1, PATIENCE + 1):
            end = time.monotonic() + stall_timeout_s
            if item is None:
                with suppress(queue.Empty):
                    item = self._made.get(timeout=stall_timeout_s)
            if isinstance(item, BaseException):
                raise item
            # Not `result(timeout)`: a TimeoutError that decoding raised would look the same.
            if item is not None and wait([item], max(0.0, end - time.monotonic())).done:
                return item.result()
            message = f"no batch for {attempt * stall_timeout_s:g} s; {holders()}"
            if attempt < PATIENCE:
                _log.warning(message)
        raise InfrastructureError(message)

    def close(self) -> None:
        """End the threads; those that hang are not waited for, which would hide why."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        # It may be waiting for the cluster; it is a daemon and holds nothing but references.
        self._thread.join(timeout=1)
