"""Fixtures: tiny models of real classes, real images, prepared samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import torch

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import Base, load_base
from raytune_vlm.models.tiny import write_tiny_model
from raytune_vlm.prepare.store import (
    PreparedSplit,
    RowWriter,
    encoded_to_row,
    open_split,
    write_index,
)


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> the folder of its tiny model, written once a session."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(model_type: str) -> Path:
        path = root / model_type
        if not path.exists():
            write_tiny_model(model_type, path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Callable[[str], Path]) -> Callable[[str], Base]:
    """Family -> its loaded tiny model; shared, so tests must leave it as it was."""
    loaded: dict[str, Base] = {}

    def base(model_type: str) -> Base:
        if model_type not in loaded:
            loaded[model_type] = load_base(ModelConfig(name=str(tiny_model(model_type))))
        return loaded[model_type]

    return base


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A random RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """A message with so many images before its text."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


@pytest.fixture(scope="session")
def tiny_split(
    tiny_base: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PreparedSplit]:
    """Family -> 40 prepared training samples of different lengths and image sizes."""

    def split(model_type: str) -> PreparedSplit:
        base = tiny_base(model_type)
        encoder = Encoder(base.processor, base.family)
        folder = tmp_path_factory.mktemp("store")
        (folder / "shard").mkdir()
        index = []
        with RowWriter(folder / "shard" / "train.arrow") as writer:
            for number in range(40):
                conversation = [
                    turn("user", "q" * (number % 5 + 1), images=1),
                    turn("assistant", "answer"[: number % 6 + 1]),
                ]
                encoded = encoder.training(conversation, [picture(number, height=40 + number)])
                index.append(
                    {
                        "split": "train",
                        "shard": "shard",
                        "row": number,
                        "sample_id": f"s{number}",
                        "group_id": f"g{number}",
                        "origin": f"made:{number}",
                        "length": len(encoded.input_ids),
                        "num_labelled": encoded.num_labelled,
                        "num_images": 1,
                    }
                )
                writer.add(
                    {
                        "sample_id": f"s{number}",
                        "group_id": f"g{number}",
                        "prompt": "",
                        "reference": "",
                        "thumbnail": None,
                        **encoded_to_row(encoded),
                    }
                )
        write_index(folder / "index.parquet", index)
        return open_split(folder, folder / "index.parquet", "train")

    made: dict[str, PreparedSplit] = {}

    def cached(model_type: str) -> PreparedSplit:
        if model_type not in made:
            made[model_type] = split(model_type)
        return made[model_type]

    return cached


def experiment(model: Path | str = "demo", **sections: Any) -> ExperimentConfig:
    """A small experiment; sections are merged into it."""
    plain: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(model)},
        "data": {"sources": [{"type": "messages", "path": "train.jsonl"}]},
        **sections,
    }
    return ExperimentConfig.model_validate(plain)
