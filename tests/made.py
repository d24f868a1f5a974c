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

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.models.lora import scope_of

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
