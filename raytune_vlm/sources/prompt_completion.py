"""`prompt_completion`: TRL's two columns, and the images.

Both are texts, or both are lists of messages (see `messages`), which then follow each other. In
a text `<image>` is a placeholder. Where the images column has images and neither placeholders nor
image parts ask for them, they stand at the beginning of the first user turn, as in TRL.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import PromptCompletionSource
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, RowError, Shard
from raytune_vlm.sources.messages import parse_turns, with_column
from raytune_vlm.sources.rows import Row, list_table_shards, read_table


def read_shard(
    config: PromptCompletionSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The pairs of a shard."""
    columns = (config.prompt_column, config.completion_column, config.images_column)
    return read_table(config, shard, limits, columns, partial(_convert, config))


def _convert(config: PromptCompletionSource, row: Row) -> Sample:
    names = (config.prompt_column, config.completion_column)
    prompt, completion = (row.column(name) for name in names)
    if isinstance(prompt, str) and isinstance(completion, str):
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    elif isinstance(prompt, str) or isinstance(completion, str):
        kinds = " and ".join(
            f"'{name}' is {type(value).__name__}"
            for name, value in zip(names, (prompt, completion), strict=True)
        )
        raise RowError(f"columns must both be texts or both be lists of messages: {kinds}")
    else:
        turns = [*row.turns(names[0]), *row.turns(names[1])]
    messages, images = parse_turns(turns)
    if not images:
        show_first(messages, len(row.images(config.images_column)))
        images = row.images(config.images_column)
        return row.sample(messages, images)
    return row.sample(messages, with_column(images, row, config.images_column))


def show_first(messages: list[dict[str, Any]], count: int) -> None:
    """Put so many images before the first words of the user."""
    for message in messages:
        if message["role"] == "user":
            message["content"] = [*({"type": "image"} for _ in range(count)), *message["content"]]
            return


READER = Reader(list_table_shards, read_shard)
