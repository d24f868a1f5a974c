"""Parquet, cut at row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from raytune_vlm.errors import InfrastructureError
from raytune_vlm.sources.base import RowError, Shard, shorten
from raytune_vlm.sources.containers.batches import batch_rows, runs, wanted_columns
from raytune_vlm.sources.containers.raw import Container, RawRow
from raytune_vlm.sources.files import open_binary

BATCH_ROWS = 16
"""So many rows are decoded at once: their images may be large."""
BUFFER_BYTES = 1 << 20
BOMB_BYTES, BOMB_RATIO = 1 << 28, 100
"""A column of a row group that is longer, and so many times longer than in the file, is a bomb."""


def read(stream: IO[bytes], shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """The rows of the shard's row groups; a damaged group costs itself, not the others."""
    # With a buffer, a column of a row group passes through it instead of being held whole.
    with pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        known = tuple(file.schema_arrow.names)
        wanted = wanted_columns(file.schema_arrow, columns)
        groups = shard.row_groups
        number = shard.first_row - 1
        for group in range(file.num_row_groups) if groups is None else groups:
            end = number + file.metadata.row_group(group).num_rows
            try:
                _check_sizes(file.metadata.row_group(group), wanted)
                for row in _group_rows(file, group, wanted, number, end, known):
                    yield row
                    number = row.number
            except InfrastructureError:
                raise
            except Exception as error:  # damaged pages raise a dozen kinds of errors
                detail = shorten(error, 120)
                yield RawRow(number + 1, reason=f"unreadable rows as far as {end}: {detail}")
            number = end


def _check_sizes(group: Any, wanted: Sequence[str]) -> None:
    """Raise RowError for a column that would fill the memory, as far as the footer tells."""
    for column in map(group.column, range(group.num_columns)):
        name, size = column.path_in_schema.split(".")[0], column.total_uncompressed_size
        if name in wanted and size > max(BOMB_BYTES, BOMB_RATIO * column.total_compressed_size):
            raise RowError(f"column '{name}' would decompress to {size} bytes")


def _group_rows(
    file: Any, group: int, wanted: list[str], number: int, end: int, known: tuple[str, ...]
) -> Iterator[RawRow]:
    if not wanted:
        yield from (RawRow(row, columns=known) for row in range(number + 1, end + 1))
        return
    batches = file.iter_batches(
        batch_size=BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False
    )
    for batch in batches:
        yield from batch_rows(batch, wanted, number, known)
        number += batch.num_rows


def cut(shard: Shard) -> Iterator[Shard]:
    """A file as shards of whole row groups; one without a readable footer as it is."""
    try:
        with open_binary(shard.path) as stream, pq.ParquetFile(stream) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except Exception:  # reading the shard will say what is wrong
        yield shard
        return
    yield from runs(shard, sizes)


CONTAINER = Container(read, cut)
