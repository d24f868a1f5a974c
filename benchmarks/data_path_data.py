"""Seeded pictures of receipts as Parquet files, the input of `data_path.py`.

Pictures of 500 to 900 x 600 to 1000 pixels (about 0.55 megapixels), lines of text on paper with
grain, as JPEG of quality 90 (0.15 to 0.2 MB). Columns: `images` (Hugging Face `{bytes, path}`) and
`messages` (OpenAI layout); row groups of 100.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image, ImageDraw, ImageFont

ROW_GROUP = 100
ROWS_PER_FILE = 200
GRAIN = 6.5
_ITEMS = ("COFFEE", "TEA", "BREAD", "RICE", "MILK", "SOAP", "CHICKEN", "NOODLES", "SUGAR", "EGGS")

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_TURN = pa.struct([("role", pa.string()), ("content", pa.list_(_PART))])
SCHEMA = pa.schema([("images", pa.list_(_IMAGE)), ("messages", pa.list_(_TURN))])


def write_receipts(
    folder: Path, num_images: int, seed: int, rows_per_file: int = ROWS_PER_FILE
) -> dict[str, Any]:
    """Write the pictures unless they are there; says what they are like."""
    mark = folder / "about.json"
    if mark.exists():
        about: dict[str, Any] = json.loads(mark.read_text())
        return about
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, GRAIN, size=(1600, 1600)).astype(np.float32)
    sizes, pixels = [], []
    for start in range(0, num_images, rows_per_file):
        rows = []
        for index in range(start, min(start + rows_per_file, num_images)):
            picture, truth = draw_receipt(rng, grain)
            data = simplejpeg.encode_jpeg(picture, quality=90, colorsubsampling="420")
            rows.append(_row(data, f"receipt-{index:06d}.jpg", truth))
            sizes.append(len(data))
            pixels.append(picture.shape[0] * picture.shape[1])
        file = parts / f"part-{start // rows_per_file:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, row_group_size=ROW_GROUP)
    about = {
        "images": num_images,
        "seed": seed,
        "files": len(list(parts.glob("*.parquet"))),
        "mean_megapixels": round(float(np.mean(pixels)) / 1e6, 3),
        "mean_jpeg_mb": round(float(np.mean(sizes)) / 1e6, 3),
    }
    mark.write_text(json.dumps(about))
    return about


def draw_receipt(
    rng: np.random.Generator, grain: np.ndarray
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """A picture, uint8 `[height, width, 3]`, and the items written in it."""
    width, height = int(rng.integers(500, 901)), int(rng.integers(600, 1001))
    paper = tuple(int(value) for value in np.array([246, 243, 234]) - rng.integers(0, 20))
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    size = int(rng.integers(17, 26))
    font = ImageFont.load_default(size)
    ink = (int(rng.integers(20, 80)),) * 3
    items = []
    for top in range(size, height - 2 * size, int(size * 1.5)):
        name, count = str(rng.choice(_ITEMS)), int(rng.integers(1, 10))
        price = f"{int(rng.integers(100, 9999)) / 100:.2f}"
        draw.text((size, top), f"{count} x {name}", font=font, fill=ink)
        draw.text((width - 5 * size, top), price, font=font, fill=ink)
        if len(items) < 6:
            items.append({"name": name, "count": str(count), "price": price})
    left, top = rng.integers(0, 1600 - width), rng.integers(0, 1600 - height)
    pixels = np.asarray(image) + grain[top : top + height, left : left + width, None]
    return np.clip(pixels, 0, 255).astype(np.uint8), items


def _row(data: bytes, name: str, truth: list[dict[str, str]]) -> dict[str, Any]:
    asked = [
        {"type": "image", "text": None},
        {"type": "text", "text": "Parse this receipt into JSON."},
    ]
    answer = [{"type": "text", "text": json.dumps({"items": truth})}]
    return {
        "images": [{"bytes": data, "path": name}],
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ],
    }
