"""Features of images: milliseconds to compute those of an image, and to read them from the disk.

    python benchmarks/feature_store.py [--model-size small] [--samples 32] [--side 448]
    python benchmarks/feature_store.py --model-size 3b      # on CUDA: bfloat16

A random Qwen2.5-VL of the real class. One executor computes the features of every sample, without
a store and with one, where writing and syncing count; another reads them: once with checksums, and
again. All bring them to the device as a batch of one. Medians over interleaved repetitions, each
with a folder of its own; what was just written is in the page cache, as it is where it fits. Also
given: the seconds that the digest of the tower takes, once an executor.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import psutil
import torch
from packed_rows import write_split
from train_step import write_model

from raytune_vlm.collate.batch import collate
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.feature_store import open_store
from raytune_vlm.collate.features import Features
from raytune_vlm.collate.tower_digest import tower_digest
from raytune_vlm.models.loading import Base, load_base
from raytune_vlm.prepare.store import PreparedSplit

MUCH = 10**10


class Held:
    """Samples with their pixels in memory: what is measured does not decode images."""

    def __init__(self, base: Base, split: PreparedSplit) -> None:
        self._samples = [split.encoded(row) for row in range(len(split))]
        pad = base.processor.tokenizer.pad_token_id
        self.batches = [
            collate([sample], base.family, pad_token_id=pad) for sample in self._samples
        ]

    def encoded(self, number: int) -> Encoded:
        """The encoded sample of a row."""
        return self._samples[number]


def seconds(features: Features, held: Held, device: str) -> float:
    """Seconds to bring the features of every sample but the first to the device."""
    features.replace(held.batches[0], held, [0])  # computed and checked whatever there is
    began = time.perf_counter()
    for row, batch in enumerate(held.batches[1:], start=1):
        features.replace(batch, held, [row])
    if features.disk is not None:
        features.disk.flush()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _allow(file: Path, pixels: int) -> None:
    """Let the processor take images of so many pixels; the tiny model's makes them smaller."""
    plain = json.loads(file.read_text())
    plain["image_processor"]["size"]["longest_edge"] = pixels
    file.write_text(json.dumps(plain))


@click.command(context_settings={"show_default": True})
@click.option("--samples", default=32, help="Prepared samples, an image each.")
@click.option("--side", default=448, help="Pixels of an image's side.")
@click.option("--repetitions", default=3, help="Of every way, interleaved.")
@click.option("--model-size", default="small", type=click.Choice(["small", "3b"]))
def main(samples: int, side: int, repetitions: int, model_size: str) -> None:
    """Print a line for each way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = write_model(folder / "model", model_size)
        _allow(folder / "model" / "processor_config.json", side * side)
        base = load_base(settings, device)
        held = Held(base, write_split(base, folder / "data", samples, side))
        began = time.perf_counter()
        tower_digest(base, device)
        digest = time.perf_counter() - began
        for repetition in range(repetitions):
            root = folder / f"features-{repetition}"
            for way in ("computed", "computed and written", "read", "read again"):
                if way != "read again":
                    features = Features(base, device, MUCH, click.echo)
                    if way != "computed":
                        features.disk = open_store(root, base, device, MUCH, click.echo)
                taken.setdefault(way, []).append(seconds(features, held, device))
        size = sum(file.stat().st_size for file in root.glob("*/*"))
    click.echo(
        f"{samples} images of {side} x {side}, {size / samples / 1e6:.2f} MB of features each, on "
        f"{device}, load {os.getloadavg()[0]:.1f}, {psutil.cpu_count()} CPUs; digest {digest:.2f} s"
    )
    for way, found in taken.items():
        each = [1000 * entry / (samples - 1) for entry in found]
        click.echo(
            f"{way:21} {statistics.median(each):8.2f} ms an image "
            f"({min(each):.2f} to {max(each):.2f})"
        )


if __name__ == "__main__":
    main()
