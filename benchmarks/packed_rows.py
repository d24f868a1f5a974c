"""Packed rows against padded ones: seconds and real tokens of training steps on the same samples.

    python benchmarks/packed_rows.py [--family qwen2_5_vl] [--samples 256] [--repetitions 3]

Three ways to train on the same conversations, whose lengths vary as those of receipts do
(`data_path_lengths.py`, shortened): a sample a row in random order, a sample a row in groups of
like length, and packed rows. The limit of tokens per forward pass, padding included, is the same
for all. Interleaved repetitions in one process, one thread.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from data_path_lengths import receipt_like_lengths
from PIL import Image

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.pixels import PIXEL_NAMES, PixelMaker
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.images import encode_png
from raytune_vlm.models.loading import Base, load_base
from raytune_vlm.prepare.store import (
    PreparedSplit,
    RowWriter,
    encoded_to_row,
    open_split,
    write_index,
)
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

TOKENS = 1024
"""Of a forward pass, and of a packed row."""
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_tokens": TOKENS},
    "grouped": {"micro_batch_tokens": TOKENS, "group_by_length": True},
    "packed": {"pack_tokens": TOKENS, "micro_batch_size": 1},
}


def write_split(base: Base, folder: Path, count: int, side: int = 56) -> PreparedSplit:
    """Conversations with one square image each, of receipt-like lengths, prepared."""
    encoder = Encoder(base.processor, base.family, sizes_only=True)
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    noise = np.random.default_rng(0)
    answers = np.clip(receipt_like_lengths(count, seed=0) // 4, 8, TOKENS - 128)
    (folder / "shard").mkdir(parents=True)
    index = []
    with RowWriter(folder / "shard" / "train.arrow") as writer:
        for number, length in enumerate(answers.tolist()):
            image = Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8))
            asked = [{"type": "image"}, {"type": "text", "text": "read"}]
            talk = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": "x" * length}]},
            ]
            encoded = encoder.training(talk, [image])
            for name in PIXEL_NAMES:
                encoded.tensors.pop(name, None)
            writer.add(stored(number, encoded, [encode_png(image)]))
            index.append(indexed(number, encoded, num_images=1))
    write_index(folder / "index.arrow", index)
    return open_split(folder, folder / "index.arrow", "train", maker.decode)


def stored(number: int, encoded: Encoded, images: list[bytes]) -> dict[str, Any]:
    """A sample's row in the store."""
    names = {"sample_id": f"s{number}", "group_id": f"s{number}", "prompt": "", "reference": ""}
    return {**names, "images": images, **encoded_to_row(encoded)}


def indexed(number: int, encoded: Encoded, num_images: int) -> dict[str, Any]:
    """A sample's row in the index."""
    name = f"s{number}"
    return {
        **{"split": "train", "shard": "shard", "row": number, "source": 0},
        **{"sample_id": name, "group_id": name, "images_id": "", "origin": name},
        **{"length": len(encoded.input_ids), "num_labelled": encoded.num_labelled},
        **{"num_media": 0, "num_images": num_images, "num_bytes": 0, "num_pixel_bytes": 0},
        "truncated": False,
    }


def measure(base: Base, split: PreparedSplit, way: dict[str, Any], samples: int) -> float:
    """Seconds per thousand real tokens, over steps that use about all samples once."""
    plain = {
        "name": "packed_rows",
        "data": {"max_length": TOKENS, "sources": [{"type": "messages", "path": "none"}]},
        "train": {"max_steps": 1000, "batch_size": 16, "micro_batch_size": 16, **way},
    }
    run = Run(base, split, ExperimentConfig.model_validate(plain), World(), TrainingData("b"))
    try:
        run.step()  # the audit
        seen, tokens, began = 0, 0, time.perf_counter()
        while seen < samples:
            tokens += run.step().tokens
            seen += len(run.plan.rows(run.steps_done - 1))
        return 1000 * (time.perf_counter() - began) / tokens
    finally:
        run.close()


@click.command()
@click.option("--family", default="qwen2_5_vl", show_default=True)
@click.option("--samples", default=256, show_default=True)
@click.option("--repetitions", default=3, show_default=True)
def main(family: str, samples: int, repetitions: int) -> None:
    """Measure the three ways in turn; print medians and their ratios to `padded`."""
    torch.set_num_threads(1)
    base = load_base(ModelConfig(name=f"tiny:{family}"))
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="raytune_vlm-benchmark-") as folder:
        split = write_split(base, Path(folder), samples)
        for _ in range(repetitions):
            for name, way in WAYS.items():
                found[name].append(measure(base, split, way, samples))
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = {name: value / medians["padded"] for name, value in medians.items()}
    print(json.dumps({"seconds_per_1000_tokens": found, "ratio_to_padded": ratios}, indent=1))


if __name__ == "__main__":
    main()
