"""The contestants of `data_path.py`: how images get from Parquet files to a training loop.

Each is a function of a `Task` that makes everything ready and returns `consume(parts)`; see
`data_path_ours.py` for the contract. Heavy imports stand inside: Ray's workers import this file.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from data_path_ours import ours_encoded, ours_first_batch, ours_prepared, ours_streaming
from data_path_run import Consume, Task

BATCH = 8
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 1_003_520


def bare(task: Task) -> Consume:
    """The least that has to be done: read, decode with simplejpeg, resize as uint8; one thread."""
    import simplejpeg
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    torch.set_num_threads(1)

    def consume(parts: Path) -> dict[str, Any]:
        images = 0
        for row in _rows(parts, ["images"]):
            pixels = torch.from_numpy(simplejpeg.decode_jpeg(row["images"][0]["bytes"]))
            pixels = pixels.permute(2, 0, 1)[None]
            size = smart_resize(
                *pixels.shape[2:], factor=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
            )
            torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
            images += 1
        return {"images": images}

    return consume


def dataloader_hf(task: Task) -> Consume:
    """A `DataLoader` (2 workers, batches of 8) whose collate function is the HF processor."""
    import torch

    _processor(str(task.model))  # the workers are forked: they have it

    def consume(parts: Path) -> dict[str, Any]:
        class Rows(torch.utils.data.IterableDataset):
            def __iter__(self) -> Iterator[dict[str, Any]]:
                worker = torch.utils.data.get_worker_info()
                return _rows(parts, None, worker.id, worker.num_workers)

        loader = torch.utils.data.DataLoader(
            Rows(), batch_size=BATCH, num_workers=2, collate_fn=partial(_collate, str(task.model))
        )
        images = 0
        for batch in loader:
            assert batch["pixel_values"].dtype == torch.float32
            images += len(batch["input_ids"])
        return {"images": images}

    return consume


def map_batches_hf(task: Task) -> Consume:
    """The HF processor inside `map_batches`: float pixels travel through Ray's object store.

    As a function rather than an actor class: its workers stay, with the processor, from the warm-up
    to the measurement.
    """
    ray_data = _start_ray(task)
    _load_on_every_worker(task)

    def consume(parts: Path) -> dict[str, Any]:
        dataset = ray_data.read_parquet(str(parts)).map_batches(
            _processed, batch_size=BATCH, fn_kwargs={"model": str(task.model)}
        )
        images = 0
        for batch in dataset.iter_batches(batch_size=BATCH):
            assert batch["pixel_values"][0].dtype == np.float32
            images += len(batch["input_ids"])
        operators = dataset.get_stats_summary().operators_stats
        sizes = [each.output_size_bytes.sum for each in operators if each.output_size_bytes]
        return {"images": images, "object_store_bytes": int(sum(sizes))}

    return consume


def read_parquet_default(task: Task) -> Consume:
    """`read_parquet` with Ray Data's defaults: how long until the first batch."""
    ray_data = _start_ray(task)

    def consume(parts: Path) -> dict[str, Any]:
        began = time.perf_counter()
        batch = next(iter(ray_data.read_parquet(str(parts)).iter_batches(batch_size=BATCH)))
        return {"images": len(batch["images"]), "first_batch_s": time.perf_counter() - began}

    return consume


CONTESTANTS = {
    "bare": bare,
    "dataloader_hf": dataloader_hf,
    "map_batches_hf": map_batches_hf,
    "read_parquet_default": read_parquet_default,
    "streaming": ours_streaming,
    "encoded": ours_encoded,
    "prepared": ours_prepared,
    "first_batch": ours_first_batch,
}


def write_model(folder: Path) -> None:
    """A tiny Qwen2.5-VL whose processor leaves half a megapixel about as it is."""
    from raytune_vlm.config.model import ModelConfig
    from raytune_vlm.models.loading import load_processor
    from raytune_vlm.models.tiny import write_tiny_model

    if not (folder / "done").exists():
        write_tiny_model("qwen2_5_vl", folder)
        processor = load_processor(ModelConfig(name=str(folder)))
        processor.image_processor.size = {
            "shortest_edge": MIN_PIXELS,
            "longest_edge": MAX_PIXELS,
        }
        processor.save_pretrained(folder)
        (folder / "done").touch()


def _rows(
    parts: Path, columns: list[str] | None, start: int = 0, step: int = 1
) -> Iterator[dict[str, Any]]:
    """Every `step`-th row group's rows, one row group in memory at a time."""
    files = [pq.ParquetFile(file) for file in sorted(parts.glob("*.parquet"))]
    groups = [(file, number) for file in files for number in range(file.num_row_groups)]
    for file, number in groups[start::step]:
        for batch in file.read_row_group(number, columns=columns).to_batches(max_chunksize=BATCH):
            yield from batch.to_pylist()


@lru_cache
def _processor(model: str) -> Any:
    from raytune_vlm.config.model import ModelConfig
    from raytune_vlm.models.loading import load_processor

    return load_processor(ModelConfig(name=model))


def _collate(model: str, rows: list[dict[str, Any]]) -> Any:
    """Rows as a batch of tensors, in the way that the processors' guides show."""
    from PIL import Image

    conversations = []
    for row in rows:
        pictures = iter(row["images"])
        turns = []
        for turn in row["messages"]:
            content = [
                {"type": "image", "image": Image.open(io.BytesIO(next(pictures)["bytes"]))}
                if part["type"] == "image"
                else {"type": "text", "text": part["text"]}
                for part in turn["content"]
            ]
            turns.append({"role": turn["role"], "content": content})
        conversations.append(turns)
    batch = _processor(model).apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    batch["labels"] = batch["input_ids"].clone()
    return batch


def _processed(batch: dict[str, np.ndarray], model: str) -> dict[str, Any]:
    """A batch of rows as columns; the patches of each image apart, since rows have one length."""
    rows = [
        {"images": images, "messages": messages}
        for images, messages in zip(batch["images"], batch["messages"], strict=True)
    ]
    made = _collate(model, rows)
    lengths = made["image_grid_thw"].prod(dim=1).tolist()
    columns = {name: list(made[name].numpy()) for name in ("input_ids", "labels", "image_grid_thw")}
    patches = [part.numpy() for part in made["pixel_values"].split(lengths)]
    return {**columns, "pixel_values": patches}


def _load_on_every_worker(task: Task) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def load() -> None:
        _processor(str(task.model))
        time.sleep(2)  # so that each takes a worker of its own

    ray.get([load.remote() for _ in range(task.num_cpus)])


def _start_ray(task: Task) -> Any:
    import logging

    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=task.num_cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data
