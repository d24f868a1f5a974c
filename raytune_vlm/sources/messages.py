"""`messages`: conversations as OpenAI and transformers write them.

`content` is a text, in which `<image>` is a placeholder, or a list of parts:
`{"type": "text", "text": ...}`, `{"type": "image", "image": <image>}`,
`{"type": "image_url", "image_url": <path or data URI, or {"url": ...}>}`, and
`{"type": "image"}`, which takes the next entry of the images column. Parquet fills the fields that
a part does not have with null: these are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import MessagesSource
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, RowError, Shard, shorten, text_parts
from raytune_vlm.sources.rows import Row, list_table_shards, read_table

_IMAGE_KEYS = ("image", "image_url", "url")
FROM_COLUMN = object()
"""Stands for an image that the images column holds."""


def read_shard(
    config: MessagesSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The conversations of a shard."""
    columns = (config.messages_column, config.images_column, config.tools_column)
    return read_table(config, shard, limits, columns, partial(convert, config))


def convert(config: MessagesSource, row: Row) -> Sample:
    """A row as a sample; raises RowError."""
    messages, images = parse_turns(row.turns(config.messages_column))
    tools = _tools(row.raw.values.get(config.tools_column), config.tools_column)
    return row.sample(messages, with_column(images, row, config.images_column), tools)


def _tools(value: Any, column: str) -> list[dict[str, Any]]:
    """The column of tools: a list of objects, or JSON of one."""
    if isinstance(value, str) and value:
        value = _json(value, f"column '{column}'")
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"column '{column}' must hold a list of tools, each an object")
    return value


def _tool_calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """OpenAI's calls, arguments as objects: chat templates write them as JSON themselves."""
    if not isinstance(calls, list):
        raise RowError(f"turn {number}: tool_calls must be a list, not {type(calls).__name__}")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"turn {number}: a tool call has no function with a name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"turn {number}: the arguments of {function['name']}")
        found.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return found


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowError(f"{what} is not JSON: {shorten(text, 40)}") from None


def parse_turns(turns: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns with typed parts, and their images in order: each its value, or `FROM_COLUMN`."""
    images: list[Any] = []
    return [_turn(number, turn, images) for number, turn in enumerate(turns, 1)], images


def with_column(images: list[Any], row: Row, name: str) -> list[Any]:
    """The images with those of the column in their places; raises RowError unless they fit."""
    row.check_images(sum(image is FROM_COLUMN for image in images), name)
    column = iter(row.images(name))
    return [next(column) if image is FROM_COLUMN else image for image in images]


def _turn(number: int, turn: Any, images: list[Any]) -> dict[str, Any]:
    """A turn with typed parts; appends each image of it, or `FROM_COLUMN`, to `images`."""
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} must be an object, not {type(turn).__name__}")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise RowError(f"turn {number} has no 'role'")
    calls = _tool_calls(number, turn["tool_calls"]) if turn.get("tool_calls") else []
    if calls and content is None:
        content = ""
    if isinstance(content, str):
        parts = text_parts(content)
        images.extend(FROM_COLUMN for part in parts if part["type"] == "image")
    elif isinstance(content, list):
        parts = [_part(number, part, images) for part in content]
    else:
        kind = type(content).__name__
        raise RowError(f"turn {number} ({shorten(role, 24)}): content is {kind}, not text or parts")
    return {"role": role, "content": parts, **({"tool_calls": calls} if calls else {})}


def _part(number: int, part: Any, images: list[Any]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise RowError(f"turn {number}: a part must be an object, not {type(part).__name__}")
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if kind not in ("image", "image_url"):
        raise RowError(f"turn {number}: part type '{shorten(kind, 24)}' is not supported")
    if part.get("text"):
        raise RowError(f"turn {number}: an image part carries text")
    given = [part[key] for key in _IMAGE_KEYS if part.get(key) is not None]
    if part.get("bytes") is not None or part.get("path") is not None:
        given.append({"bytes": part.get("bytes"), "path": part.get("path")})
    if len(given) > 1:
        raise RowError(f"turn {number}: an image part names {len(given)} images")
    if not given and kind == "image_url":
        raise RowError(f"turn {number}: an 'image_url' part without its image_url")
    image = given[0] if given else FROM_COLUMN
    if isinstance(image, dict) and "url" in image:
        image = image["url"]
    expected = sum(earlier is FROM_COLUMN for earlier in images)
    if image is FROM_COLUMN and part.get("index") not in (None, expected):
        raise RowError(f"turn {number}: image index {part['index']} where {expected} is expected")
    images.append(image)
    return {"type": "image"}


READER = Reader(list_table_shards, read_shard)
