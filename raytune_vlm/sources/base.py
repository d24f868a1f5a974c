"""What a source is: two functions over shards, and the checks that every sample passes.

A reader is `Reader(list_shards, read_shard)`:

- `list_shards(config, root, allow_network)` runs on the driver and is cheap. It raises DataError,
  in one line, where the path is wrong.
- `read_shard(config, shard, limits)` runs on a Ray worker. One row in, one `Sample` or one
  `Quarantined` out, streaming; a bad row never raises and never costs its neighbours. Images are
  read but not decoded. It raises InfrastructureError where a remote store fails, which is no flaw
  of the data.

`max_samples` counts rows (samples and quarantined ones alike) in the order of the shards: where it
is set, `list_shards` counts the rows and gives each shard its `limit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import DataError, InfrastructureError
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.visible import one_line

PLACEHOLDER = "<image>"
"""Where an image stands in a turn that is plain text."""


@dataclass(frozen=True)
class Shard:
    """A part of a source that one task reads: plain data, picklable."""

    path: str
    """The file (for SROIE the folder): an absolute local path or a URL."""
    index: int
    """Position among the shards of the source."""
    shown: str
    """`path` as people are shown it: relative to `data.root` where it lies inside."""
    folders: tuple[str, ...]
    """Relative image paths are looked up in these, in order, and must stay inside one of them."""
    limit: int | None = None
    """Read at most so many rows; None: all."""
    row_groups: tuple[int, ...] | None = None
    """Parquet, Arrow: the row groups (record batches) of this shard; None: all, or neither."""
    first_row: int = 1
    """Number of the shard's first row in its file."""
    start: int = 0
    """JSON lines: the byte of the file at which the shard begins."""
    end: int | None = None
    """JSON lines: the byte after the shard's last one; None: the end of the file."""
    digest: str = ""
    """What the shard's content can be known by without reading it again: the hash of its byte
    range, of what a store says of a remote file (size, time, tag), of a user's module with the
    state of the files; empty: only the file's own size and time can tell."""
    details: str = ""
    """LLaMA-Factory: the entry of `dataset_info.json`, as JSON. Documents: what renders them."""
    members: tuple[str, ...] = ()
    """SROIE: the stems of the receipts of this shard."""


@dataclass(frozen=True)
class Reader:
    """The contract of a source format. The config is the model of the source's `type`."""

    list_shards: Callable[[Any, Path, bool], list[Shard]]
    read_shard: Callable[[Any, Shard, ImageLimits], Iterator[Sample | Quarantined]]


class RowError(DataError):
    """A row is refused; readers turn it into a `Quarantined`, it never leaves a source."""


def number_shards(
    shards: Iterable[Shard], max_samples: int | None, count: Callable[[Shard, int], int]
) -> list[Shard]:
    """The shards with their index, and with their `limit` where `max_samples` is set.

    `count(shard, at_most)` gives the number of rows of a shard, as far as `at_most`; shards beyond
    `max_samples` are not asked for.
    """
    if max_samples is None:
        return [replace(shard, index=index) for index, shard in enumerate(shards)]
    left = max_samples
    kept: list[Shard] = []
    for shard in shards:
        rows = min(count(shard, left), left)
        kept.append(replace(shard, index=len(kept), limit=rows))
        left -= rows
        if left <= 0:
            break
    return kept


def attempt(origin: str, split: str, make: Callable[[], Sample]) -> Sample | Quarantined:
    """What `make` returns, or what it raises, quarantined: no row costs its neighbours."""
    try:
        return make()
    except RowError as error:
        return Quarantined(origin, error.message, split)
    except InfrastructureError:
        raise
    except Exception as error:  # rows come from others
        reason = f"unexpected {type(error).__name__}: {shorten(error, 160)}"
        return Quarantined(origin, reason, split)


def text_parts(text: str) -> list[dict[str, Any]]:
    """A plain text turn as parts, each `<image>` in it expanded in place."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def check_counts(placeholders: int, images: int, hint: str = "") -> None:
    """Raise RowError unless each placeholder has its image and each image its placeholder."""
    if placeholders != images:
        raise RowError(
            f"{placeholders} {PLACEHOLDER} placeholder{'s' * (placeholders != 1)} "
            f"but {images} image{'s' * (images != 1)}{hint}"
        )


def make_sample(
    *,
    origin: str,
    messages: list[dict[str, Any]],
    images: Sequence[bytes],
    group_id: str | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> Sample:
    """A checked sample with its ids.

    `sample_id` is the hash of messages and images; `group_id`, where the row gives none, the hash
    of the images (the same images are the same group), and without images the `sample_id`.
    Raises RowError where turns are missing, empty or in odd order, where the last one is not an
    answer, or where images and placeholders differ in number.
    """
    clean = [_clean_turn(number, turn) for number, turn in enumerate(messages, 1)]
    _check_order(clean)
    placeholders = sum(part["type"] == "image" for turn in clean for part in turn["content"])
    check_counts(placeholders, len(images))
    try:
        (group_id or "").encode()
        content = {"turns": clean, "tools": tools} if tools else clean
        text = json.dumps(
            content, ensure_ascii=False, sort_keys=True, separators=(",", ":")
        ).encode()
    except UnicodeEncodeError as error:
        raise RowError("the text holds half of a surrogate pair: not valid Unicode") from error
    digests = [hashlib.sha256(image).digest() for image in images]
    sample_id = hashlib.sha256(hashlib.sha256(text).digest() + b"".join(digests)).hexdigest()[:16]
    if group_id is None and digests:
        group_id = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    return Sample(
        sample_id=sample_id,
        group_id=sample_id if group_id is None else group_id,
        origin=one_line(origin),
        messages=clean,
        images=list(images),
        tools=tools or [],
    )


def question(instruction: str, answer: str) -> list[dict[str, Any]]:
    """The two turns of a sample that shows one image, asks, and is answered."""
    asked = [{"type": "image"}, {"type": "text", "text": instruction}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def shorten(value: Any, length: int = 80) -> str:
    """A value of a row for a message: one line, never long."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _clean_turn(number: int, turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with nothing but role, image parts, non-empty text parts and tool calls."""
    role, calls = turn["role"], turn.get("tool_calls") or []
    parts: list[dict[str, Any]] = []
    for part in turn["content"]:
        if part["type"] == "image":
            if role != "user":
                raise RowError(f"turn {number} ({role}) holds an image: only user turns may")
            parts.append({"type": "image"})
        elif not isinstance(part["text"], str):
            kind = type(part["text"]).__name__
            raise RowError(f"turn {number} ({role}): text must be a string, not {kind}")
        elif part["text"]:
            parts.append({"type": "text", "text": part["text"]})
    if calls and role != "assistant":
        raise RowError(f"turn {number} ({role}) calls tools: only assistant turns may")
    if not calls and not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise RowError(f"turn {number} ({role}) is empty")
    return {"role": role, "content": parts, **({"tool_calls": calls} if calls else {})}


def _check_order(turns: list[dict[str, Any]]) -> None:
    """Raise RowError unless the turns follow each other as a talk does.

    system?, then user and assistant in turn; an assistant that calls tools is followed by their
    answers (`tool`) and then by the assistant; the last turn is an answer.
    """
    if not turns:
        raise RowError("the conversation is empty")
    expected: tuple[str, ...] = ("system", "user")
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role not in expected:
            found = shorten(role, 24)
            raise RowError(f"turn {number} is '{found}' where '{expected[-1]}' is expected")
        if role == "tool":
            expected = ("tool", "assistant")
        elif role == "assistant":
            expected = ("tool",) if turn.get("tool_calls") else ("user",)
        else:
            expected = ("user",) if role == "system" else ("assistant",)
    if turns[-1]["role"] != "assistant":
        raise RowError(f"the last turn is '{turns[-1]['role']}', not 'assistant'")
    if turns[-1].get("tool_calls"):
        raise RowError("the last turn calls tools; it must be an answer")
