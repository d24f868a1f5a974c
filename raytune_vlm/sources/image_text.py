"""`image_text`: one image and the text that the model shall give for the instruction.

The text is a column, or made of several: `text_template: "{name}. {description}"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import ImageTextSource, parse_template
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, RowError, Shard, question
from raytune_vlm.sources.rows import Row, list_table_shards, read_table


def read_shard(
    config: ImageTextSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The pairs of a shard."""
    columns = [config.text_column]
    if config.text_template is not None:
        columns = [name for _, name in parse_template(config.text_template) if name is not None]
    columns = [config.image_column, *columns]
    return read_table(config, shard, limits, columns, partial(convert, config))


def convert(config: ImageTextSource, row: Row) -> Sample:
    """A row as a sample; raises RowError."""
    if config.text_template is None:
        text = row.text(config.text_column)
    else:
        text = _filled(config.text_template, row)
    messages = question(config.instruction, text)
    row.column(config.image_column)
    return row.sample(messages, row.images(config.image_column))


def _filled(template: str, row: Row) -> str:
    """The template with the row's values; numbers are written as they are."""
    pieces = []
    for literal, name in parse_template(template):
        pieces.append(literal)
        if name is not None:
            value = row.column(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                kind = type(value).__name__
                raise RowError(f"column '{name}' must be a string or a number, not {kind}")
            pieces.append(str(value))
    return "".join(pieces)


READER = Reader(list_table_shards, read_shard)
