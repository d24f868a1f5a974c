"""Streaming: Ray Data ships the plan's samples with their images still encoded, in order; threads
of the training worker decode and collate them ahead of the optimizer.

What travels is what the JPEG file weighs and the token ids: float pixels would be 76 times as much.
The reading tasks reserve no CPU, so trials that hold every CPU of the cluster cannot keep their own
data from coming; how much they may run ahead is bounded. A task knows the store and the plan's
settings, not the plan: it works out its steps itself, so nothing grows with the data.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from raytune_vlm.config.augmentation import AugmentationConfig
from raytune_vlm.errors import DataError, InfrastructureError
from raytune_vlm.prepare.feed import Collation, MicroBatch, Part
from raytune_vlm.prepare.holders import holders
from raytune_vlm.prepare.plan import Plan, PlanSpec
from raytune_vlm.prepare.store import (
    SAMPLE_FIELDS,
    PreparedSplit,
    open_split,
    sample_at,
)

STREAM_TASKS = 2
"""Reading tasks at once for one worker."""
MICRO_BATCHES_PER_TASK = 16
"""A block of one micro-batch would cost more to hand over than to make."""
STREAM_BYTES = 512 * 2**20
"""Object store that one stream may fill."""
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
        """The samples of this rank in some steps, one a row, in order."""
        split, plan = _opened(self)
        pieces, places = [], []
        for step in steps:
            parts = self.collation.parts(plan, split.lengths, step)
            for number, part in enumerate(parts):
                pieces.append(split.samples(part.rows))
                places += [
                    (step, number, row, epoch, part.counts)
                    for row, epoch in zip(part.rows, part.epochs, strict=True)
                ]
        table = pa.concat_tables(pieces).combine_chunks()
        for name, column in zip(_PLACE_COLUMNS, zip(*places, strict=True), strict=True):
            table = table.append_column(name, pa.array(column))
        return table


_PLACE_COLUMNS = ("step", "part", "row", "epoch", "counts")


@functools.lru_cache(maxsize=2)
def _opened(source: StreamSource) -> tuple[PreparedSplit, Plan]:
    split = open_split(source.store, source.index_file, "train")
    plan = Plan(split.lengths, split.sources, source.spec, data_digest=source.data_digest)
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

    def make(self, part: Part, rows: pa.RecordBatch) -> MicroBatch:
        """Decode and collate one micro-batch."""
        samples = []
        for place, (row, epoch) in enumerate(zip(part.rows, part.epochs, strict=True)):
            sample = sample_at(rows, place)
            images = rows.column("images")[place].as_py()
            sample.tensors.update(self._pixels(images, row, epoch))
            samples.append(sample)
        return self.collation.collate(part, samples)

    def _pixels(self, images: list[bytes], row: int, epoch: int) -> dict[str, np.ndarray]:
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
                epoch=epoch,
                place=place,
            )
            for place, pixels in enumerate(self.maker.open(images))
        ]
        made = self.maker.make(pictures)
        return made


class StreamingFeed:
    """Micro-batches that come from Ray Data, from the first step that is asked for.

    Parameters
    ----------
    source
        What the tasks read.
    decoding
        What the threads do with it.
    plan
        The plan of `source`: every batch that arrives is compared with it.
    lengths
        Tokens of each training sample.
    max_steps
        The stream ends after so many steps of the plan.
    num_threads
        Threads that decode.
    stall_timeout_s
        See `data.stall_timeout_s`.
    """

    def __init__(
        self,
        source: StreamSource,
        decoding: Decoding,
        plan: Plan,
        lengths: np.ndarray,
        *,
        max_steps: int,
        num_threads: int = 1,
        stall_timeout_s: float = 120.0,
    ) -> None:
        self._source, self._decoding = source, decoding
        self._plan, self._lengths = plan, lengths
        self._max_steps, self._num_threads = max_steps, num_threads
        self._stall_timeout_s = stall_timeout_s
        self._next: int | None = None
        self._ahead: _Ahead | None = None

    def step(self, number: int) -> list[MicroBatch]:
        """See `Feed.step`; a step out of order starts the stream anew.

        Raises
        ------
        InfrastructureError
            If no batch came for a long time, or another one than the plan says.
        """
        if self._ahead is None or number != self._next:
            self.close()
            self._ahead = _Ahead(
                _blocks(self._source, number, self._max_steps), self._decoding, self._num_threads
            )
        self._next = number + 1
        expected = self._source.collation.parts(self._plan, self._lengths, number)
        made = []
        for part in expected:
            batch = self._ahead.next(self._stall_timeout_s)
            if batch.rows != part.rows:
                raise InfrastructureError(
                    f"the stream brought samples {batch.rows} where the plan has {part.rows}"
                )
            made.append(batch)
        return made

    def close(self) -> None:
        """Drop the stream; its tasks and threads end."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _blocks(source: StreamSource, first: int, max_steps: int) -> Iterator[pa.Table]:
    """The tables of `StreamSource.read` for all steps from the first, in order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    units = source.spec.batch_size / source.collation.world_size
    per_step = max(1.0, units / source.collation.micro_batch_size)
    steps_per_task = max(1, int(MICRO_BATCHES_PER_TASK / per_step))
    count = max_steps - first

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        return source.read([first + int(number) for number in batch["id"]])

    dataset = ray.data.range(count, override_num_blocks=-(-count // steps_per_task)).map_batches(
        read,
        batch_size=None,
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=STREAM_TASKS),
    )
    limits = ray.data.ExecutionResources(object_store_memory=STREAM_BYTES)
    dataset.context.execution_options.resource_limits = limits
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def parts_of(table: pa.Table) -> Iterator[tuple[Part, pa.RecordBatch]]:
    """The micro-batches of a table of `StreamSource.read`."""
    steps, parts = table["step"].to_numpy(), table["part"].to_numpy()
    changes = np.flatnonzero((np.diff(steps) != 0) | (np.diff(parts) != 0)) + 1
    bounds = [0, *changes.tolist(), len(table)]
    batch = table.combine_chunks().to_batches()[0]
    for start, end in itertools.pairwise(bounds):
        rows = batch.slice(start, end - start)
        yield (
            Part(
                rows=tuple(rows.column("row").to_pylist()),
                epochs=tuple(rows.column("epoch").to_pylist()),
                counts=rows.column("counts")[0].as_py(),
            ),
            rows.select([name for name, _ in SAMPLE_FIELDS]),
        )


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
                for part, rows in parts_of(table):
                    if not self._put(self._pool.submit(self._decoding.make, part, rows)):
                        return
            self._put(DataError("the stream has ended before the plan"))
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
        for attempt in range(1, PATIENCE + 1):
            try:
                item = self._made.get(timeout=stall_timeout_s)
            except queue.Empty:
                message = f"no batch for {attempt * stall_timeout_s:g} s; {holders()}"
                if attempt == PATIENCE:
                    raise InfrastructureError(message) from None
                _log.warning(message)
            else:
                if isinstance(item, BaseException):
                    raise item
                return item.result()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the threads."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._thread.join(timeout=10)
