"""`sharegpt`: `conversations` of `{from, value}`, `<image>` placeholders, an `images` column.

A `system` column with text (LLaMA-Factory's layout) becomes the system turn. Tool turns are
refused: rendered as plain words they would teach another format than the template's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import ShareGptSource
from raytune_vlm.errors import did_you_mean
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, RowError, Shard, shorten, text_parts
from raytune_vlm.sources.rows import Row, list_table_shards, read_table

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
TOOL_ROLES = frozenset({"function", "function_call", "function_response", "observation", "tool"})
SYSTEM_COLUMN = "system"


def read_shard(
    config: ShareGptSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The conversations of a shard."""
    columns = (config.conversations_column, config.images_column, SYSTEM_COLUMN)
    return read_table(config, shard, limits, columns, partial(convert, config))


def convert(config: ShareGptSource, row: Row) -> Sample:
    """A row as a sample; raises RowError."""
    turns = row.turns(config.conversations_column)
    messages = [_turn(number, turn) for number, turn in enumerate(turns, 1)]
    system = row.raw.values.get(SYSTEM_COLUMN)
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    count = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    row.check_images(count, config.images_column)
    return row.sample(messages, row.images(config.images_column))


def _turn(number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} must be an object, not {type(turn).__name__}")
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str):
        raise RowError(f"turn {number} has no 'from'")
    if speaker in TOOL_ROLES:
        raise RowError(f"turn {number} is a tool turn ('{speaker}'), which is not supported")
    if speaker not in ROLES:
        name = shorten(speaker, 24)
        raise RowError(f"turn {number} is from '{name}'{did_you_mean(name, ROLES)}")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RowError(f"turn {number} ({speaker}): value must be a string, not {kind}")
    return {"role": ROLES[speaker], "content": text_parts(value)}


READER = Reader(list_table_shards, read_shard)
