"""Arrow IPC, the stream format (`Dataset.save_to_disk`) and the file format, cut at record batches.

Local files are mapped into memory. Whatever a batch says of itself is checked before a value is
read: offsets that lie would lead outside the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa  # type: ignore[import-untyped]

from raytune_vlm.sources.base import Shard, shorten
from raytune_vlm.sources.containers.batches import batch_rows, runs, wanted_columns
from raytune_vlm.sources.containers.raw import Container, RawRow
from raytune_vlm.sources.remote import is_remote

_FILE_MAGIC = b"ARROW1"


def read(stream: IO[bytes], shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """The rows of the shard's record batches."""
    number = shard.first_row - 1
    groups = shard.row_groups
    with _source(stream, shard) as source:
        schema, batches = _open(source)
        known = tuple(schema.names)
        wanted = wanted_columns(schema, columns)
        for group, batch in enumerate(batches):
            if groups is not None and group > groups[-1]:
                return
            if groups is not None and group < groups[0]:
                continue
            yield from _checked_rows(batch.select(wanted), wanted, number, known, batch.num_rows)
            number += batch.num_rows


def _checked_rows(
    batch: Any, wanted: list[str], number: int, known: tuple[str, ...], num_rows: int
) -> Iterator[RawRow]:
    if not wanted:
        yield from (RawRow(number + row, columns=known) for row in range(1, num_rows + 1))
        return
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for row in range(num_rows):
            piece = batch.slice(row, 1)
            try:
                piece.validate(full=True)
            except pa.ArrowInvalid as error:
                reason = f"unreadable row: {shorten(error, 120)}"
                yield RawRow(number + row + 1, reason=reason, columns=known)
                continue
            yield from batch_rows(piece, wanted, number + row, known)
        return
    yield from batch_rows(batch, wanted, number, known)


def _source(stream: IO[bytes], shard: Shard) -> Any:
    return pa.PythonFile(stream, "r") if is_remote(shard.path) else pa.memory_map(shard.path)


def _open(source: Any) -> tuple[Any, Iterator[Any]]:
    """The schema and the record batches of either format."""
    is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    source.seek(0)
    if not is_file:
        reader = pa.ipc.open_stream(source)
        return reader.schema, iter(reader)
    file = pa.ipc.open_file(source)
    return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))


def cut(shard: Shard) -> Iterator[Shard]:
    """A local file as shards of whole record batches; a damaged or remote one as it is."""
    if is_remote(shard.path):  # the batches of a stream are counted by reading them
        yield shard
        return
    try:
        with pa.memory_map(shard.path) as source:
            sizes = [batch.num_rows for batch in _open(source)[1]]
    except Exception:  # reading the shard will say what is wrong
        yield shard
        return
    yield from runs(shard, sizes)


CONTAINER = Container(read, cut)
