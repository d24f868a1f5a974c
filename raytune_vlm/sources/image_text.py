"""`image_text`: one image and the text that the model shall give for the instruction."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import ImageTextSource
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, Shard, question
from raytune_vlm.sources.rows import Row, list_table_shards, read_table


def read_shard(
    config: ImageTextSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The pairs of a shard."""
    columns = (config.image_column, config.text_column)
    return read_table(config, shard, limits, columns, partial(_convert, config))


def _convert(config: ImageTextSource, row: Row) -> Sample:
    messages = question(config.instruction, row.text(config.text_column))
    row.column(config.image_column)
    return row.sample(messages, row.images(config.image_column))


READER = Reader(list_table_shards, read_shard)
