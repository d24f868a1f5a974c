"""What tests are made of: pictures, turns, data on disk, experiments, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from clusters import joined
from PIL import Image

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.pixels import PIXEL_NAMES
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.images import encode_png
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import scope_of
from raytune_vlm.prepare.store import RowWriter, encoded_to_row, write_index

_Server = TypeVar("_Server", bound=ThreadingHTTPServer)

WORDS = ("tea", "bun", "pie", "egg", "nut", "oat")


def write_data(folder: Path, *, num_train: int = 30, num_other: int = 8) -> None:
    """Chat rows over random pictures, three splits, JSON lines with image files beside them."""
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", num_train), ("select", num_other), ("report", num_other)):
        rows = []
        for number in range(count):
            name = f"images/{split}-{number}.png"
            picture(number + 1000 * sum(map(ord, split)), width=48, height=48).save(folder / name)
            answer = WORDS[number % len(WORDS)]
            content = [{"type": "image"}, {"type": "text", "text": "read"}]
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": content},
                        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    ],
                    "images": [name],
                }
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def write_split(base: Base, folder: Path, *names: str) -> None:
    """Prepared splits, by name; of their samples three in four have no image."""
    (folder / "shard").mkdir(parents=True)
    write_index(folder / "index.arrow", [row for n in names for row in _written(base, folder, n)])


def _written(base: Base, folder: Path, name: str) -> list[dict[str, Any]]:
    encoder = Encoder(base.processor, base.family)
    index = []
    with RowWriter(folder / "shard" / f"{name}.arrow") as writer:
        for number in range(12 if name == "train" else 7):
            images = [picture(number)] if number % 4 == 0 else []
            question = turn("user", "q" * (number % 5 + 1), images=len(images))
            answer = turn("assistant", "answer"[: number % 6 + 1])
            if name == "train":
                encoded = encoder.training([question, answer], images)
            else:
                encoded = encoder.prompt([question], images)
            for pixels in PIXEL_NAMES:
                encoded.tensors.pop(pixels, None)
            counts = {"num_media": 0, "num_bytes": 100, "num_pixel_bytes": 0}
            index.append(
                {
                    **{"split": name, "shard": "shard", "row": number, "source": 0},
                    **{"images_id": "", "truncated": False, "origin": "", **counts},
                    **{"sample_id": f"s{number}", "group_id": f"g{number}"},
                    "length": len(encoded.input_ids),
                    "num_labelled": encoded.num_labelled,
                    "num_images": len(images),
                }
            )
            texts = {"sample_id": f"s{number}", "group_id": "", "prompt": "", "reference": ""}
            pictures = [encode_png(image) for image in images]
            writer.add({**texts, "images": pictures, **encoded_to_row(encoded)})
    return index


def held_scopes(base: Any, wanted: str) -> str:
    """Those of some scopes that hold parameters at all: Donut has no projector."""
    scopes = {scope_of(name, base.family) for name, _ in base.model.named_parameters()}
    return "+".join(scope for scope in wanted.split("+") if scope in scopes)


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A random RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """A message with so many images before its text."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def experiment(model: Path | str = "demo", **sections: Any) -> ExperimentConfig:
    """A small experiment; sections are merged into it."""
    plain: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(model)},
        "data": {"sources": [{"type": "messages", "path": "train.jsonl"}]},
        **sections,
    }
    return ExperimentConfig.model_validate(plain)


def run_cli(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m raytune_vlm ...`; fails with its whole output unless it ends with 0."""
    done = subprocess.run(
        cli_command(*arguments), capture_output=True, text=True, env=cli_environment()
    )
    if check and done.returncode:
        raise AssertionError(f"status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def cli_command(*arguments: object) -> list[str]:
    """The command line as a list."""
    return [sys.executable, "-m", "raytune_vlm", *map(str, arguments)]


def cli_environment() -> dict[str, str]:
    """No cluster to join but that of `ray_cluster`, no network, no warnings turned into errors."""
    dropped = ("RAY_ADDRESS", "PYTHONWARNINGS")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, **joined(), "HF_HUB_OFFLINE": "1"}


@contextmanager
def serving(server: _Server) -> Iterator[_Server]:
    """A server on a loopback address, which answers in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
