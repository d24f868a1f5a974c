"""Writes the demo's data set: receipts of the new kind, which the base model cannot parse yet.

    python -m raytune_vlm.demo.data FOLDER

`train-NNNNN.parquet` (images inside), `select.jsonl` and `report.jsonl` (images beside them, under
`images/`). `train-broken.jsonl` holds three training samples that are broken on purpose, to show
that preparation sets such samples aside and says why: a truncated PNG file, one image part more
than there are images, and an empty answer. `dataset.json` says what the folder was made with.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raytune_vlm.demo.receipts import render_kind_b
from raytune_vlm.errors import DataError
from raytune_vlm.json_tokens import json2token

PROMPT = "parse"
FORMAT = 1
NUM_SHARDS = 3
SETTINGS_FILE = "dataset.json"
SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        (
            "messages",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        (
                            "content",
                            pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])),
                        ),
                    ]
                )
            ),
        ),
        ("group_id", pa.string()),
    ]
)


def write_demo_data(
    folder: Path,
    *,
    seed: int = 0,
    num_train: int = 800,
    num_select: int = 96,
    num_report: int = 192,
) -> None:
    """Writes the data set, whole or not at all; does nothing if the same one is there already."""
    folder = Path(folder)
    settings = {
        "format": FORMAT,
        "seed": seed,
        "num_train": num_train,
        "num_select": num_select,
        "num_report": num_report,
    }
    if _is_there(folder, settings):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        seen: set[str] = set()
        # The report comes first: its samples must not depend on the size of the other splits.
        for split, count in (("report", num_report), ("select", num_select)):
            _write_jsonl(unfinished, split, _samples(split, count, seed, seen))
        _write_parquet(unfinished, list(_samples("train", num_train, seed, seen)))
        _write_broken(unfinished, list(_samples("broken", 3, seed, seen)))
        text = json.dumps(settings, indent=2) + "\n"
        (unfinished / SETTINGS_FILE).write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp makes it private
        try:
            unfinished.rename(folder)
        except OSError:
            if not _is_there(folder, settings):  # else another process wrote the same just now
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_there(folder: Path, settings: dict[str, int]) -> bool:
    """Whether the folder holds this data set; an error if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    path = folder / SETTINGS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != settings:
        raise DataError(
            f"{folder} exists and is not the demo data set with {settings} (found {found}); "
            "remove it or choose another folder"
        )
    return True


def _samples(
    split: str, count: int, seed: int, seen: set[str]
) -> Iterator[tuple[str, Image.Image, str]]:
    """Name, picture and answer of each sample; no receipt occurs twice in all splits."""
    number = ("report", "select", "train", "broken").index(split)
    rng = np.random.default_rng([seed, number])
    index = 0
    while index < count:
        picture, truth = render_kind_b(rng)
        answer = json2token(truth)
        if answer in seen:
            continue
        seen.add(answer)
        yield f"{split}-{index:06d}", picture, answer
        index += 1


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("L").save(buffer, format="PNG")
    return buffer.getvalue()


def _messages(answer: str, *, num_images: int = 1) -> list[dict[str, Any]]:
    question: list[dict[str, str]] = [{"type": "image"}] * num_images
    return [
        {"role": "user", "content": [*question, {"type": "text", "text": PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _row(name: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": messages, "images": [f"images/{name}.png"], "group_id": name}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _write_jsonl(folder: Path, split: str, samples: Iterator[tuple[str, Image.Image, str]]) -> None:
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for name, picture, answer in samples:
        (folder / "images" / f"{name}.png").write_bytes(_png(picture))
        rows.append(_row(name, _messages(answer)))
    _write_rows(folder / f"{split}.jsonl", rows)


def _write_parquet(folder: Path, samples: list[tuple[str, Image.Image, str]]) -> None:
    for shard in range(NUM_SHARDS):
        rows = [
            {
                "images": [{"bytes": _png(picture), "path": f"{name}.png"}],
                "messages": _messages(answer),
                "group_id": name,
            }
            for name, picture, answer in samples[shard::NUM_SHARDS]
        ]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, folder / f"train-{shard:05d}.parquet")


def _write_broken(folder: Path, samples: list[tuple[str, Image.Image, str]]) -> None:
    """Three samples that no training can use, each broken in its own way."""
    kinds = ("broken-truncated-png", "broken-missing-image", "broken-empty-answer")
    rows = []
    for kind, (_, picture, answer) in zip(kinds, samples, strict=True):
        content = _png(picture)
        messages = _messages(answer)
        if kind == "broken-truncated-png":
            content = content[: len(content) // 2]
        elif kind == "broken-missing-image":
            messages = _messages(answer, num_images=2)
        else:
            messages = _messages("")
        (folder / "images" / f"{kind}.png").write_bytes(content)
        rows.append(_row(kind, messages))
    _write_rows(folder / "train-broken.jsonl", rows)


if __name__ == "__main__":
    write_demo_data(Path(sys.argv[1]))
