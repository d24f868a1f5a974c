"""The contestants of `data_path.py` that run this project's own data path.

Each takes a `Task` and returns `consume(parts)`, which delivers the collated batches of one epoch
over the Parquet files of the folder `parts` and returns at least `images`. What is done before
`consume` is called, and the call with the 64 images of the warm-up, is not measured; so the data
is prepared before. Other keys that the table shows: `first_batch_s`, `object_store_bytes` (bytes
that were put into Ray's object store) and `jpeg_bytes`.

The pixels are those of the torchvision backend, whose kernels the bare loop uses too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_path_run import Consume, Task

BATCH = 8


class Prepared:
    """One folder of Parquet files, prepared, with a feed over it."""

    def __init__(self, task: Task, parts: Path, way: str) -> None:
        from raytune_vlm.collate.pixels import PixelMaker
        from raytune_vlm.config import ExperimentConfig
        from raytune_vlm.models.loading import load_processor
        from raytune_vlm.models.location import check_model
        from raytune_vlm.prepare.feed import Collation
        from raytune_vlm.prepare.plan import Plan, PlanSpec
        from raytune_vlm.prepare.prepare import list_shards, prepare

        experiment = ExperimentConfig.model_validate(
            {
                "name": "data-path",
                "storage_path": str(task.scratch),
                "model": {"name": str(task.model), "image_backend": "torchvision"},
                "data": {
                    "sources": [{"type": "messages", "path": str(parts), "split": "train"}],
                    "max_length": 4096,
                    "tier": "pixels" if way == "prepared" else "encoded",
                },
            }
        )
        self.data = prepare(experiment, list_shards(experiment), lambda *_: None)
        family, processor = check_model(experiment.model), load_processor(experiment.model)
        self.maker = PixelMaker(
            processor.image_processor, family, "torchvision", experiment.data.image_limits
        )
        self.split = self.data.split("train", self.maker.decode)
        self.spec = PlanSpec(batch_size=BATCH, seed=0)
        self.collation = Collation(family.model_type, 0, BATCH)
        manifest, split = self.data.manifest, self.split
        self.plan = Plan(split.lengths, split.sources, self.spec, data_digest=manifest.digest)
        self.num_steps = len(split) // BATCH
        self.way, self.object_store_bytes = way, 0

    def feed(self) -> Any:
        """A feed from the first step."""
        from raytune_vlm.prepare.feed import CachedFeed
        from raytune_vlm.prepare.stream import (
            Decoding,
            DecodingFeed,
            StreamSource,
            stored_blocks,
            streamed_blocks,
        )

        if self.way == "prepared":
            return CachedFeed(self.split, self.plan, self.collation)
        blocks = stored_blocks(self.split, self.plan, self.collation, self.num_steps)
        if self.way == "streaming":
            manifest = self.data.manifest
            source = StreamSource(
                manifest.store,
                str(self.data.index_file),
                self.spec,
                manifest.digest,
                self.collation,
            )
            blocks = streamed_blocks(source, self.split, self.num_steps)

        def counted(first: int) -> Iterator[Any]:
            for table in blocks(first):
                self.object_store_bytes += table.nbytes
                yield table

        return DecodingFeed(
            counted, Decoding(self.collation, self.maker), self.plan, self.split.lengths
        )


def _ours(task: Task, way: str) -> Consume:
    import torch
    from data_path_contestants import _start_ray

    torch.set_num_threads(1)
    _start_ray(task)
    ready = {parts: Prepared(task, parts, way) for parts in (task.warm_up, task.parts)}

    def consume(parts: Path) -> dict[str, Any]:
        prepared = ready[parts]
        feed, images = prepared.feed(), 0
        for step in range(prepared.num_steps):
            images += sum(len(batch.rows) for batch in feed.step(step))
        feed.close()
        found = {"images": images}
        if way == "streaming":
            jpeg = int(prepared.split.num_bytes.sum() - 4 * prepared.split.lengths.sum())
            found |= {"object_store_bytes": prepared.object_store_bytes, "jpeg_bytes": jpeg}
        return found

    return consume


def ours_streaming(task: Task) -> Consume:
    """Encoded images through Ray Data, decoded by a thread of the consumer; shuffled globally."""
    return _ours(task, "streaming")


def ours_encoded(task: Task) -> Consume:
    """The same, but the consumer reads the memory-mapped store itself."""
    return _ours(task, "encoded")


def ours_prepared(task: Task) -> Consume:
    """Batches from the prepared pixels, which are written before the measurement."""
    return _ours(task, "prepared")


def ours_first_batch(task: Task) -> Consume:
    """Seconds from making the stream to its first batch (`first_batch_s`)."""
    import torch
    from data_path_contestants import _start_ray

    torch.set_num_threads(1)
    _start_ray(task)
    ready = {parts: Prepared(task, parts, "streaming") for parts in (task.warm_up, task.parts)}

    def consume(parts: Path) -> dict[str, Any]:
        began = time.perf_counter()
        feed = ready[parts].feed()
        images = sum(len(batch.rows) for batch in feed.step(0))
        seconds = time.perf_counter() - began
        feed.close()
        return {"images": images, "first_batch_s": seconds}

    return consume
