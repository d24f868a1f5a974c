"""Rows of a container file, by its suffix: one module a container.

JSON lines (also gzipped), Parquet and Arrow files stream; a JSON list has to be held whole. Rows
are numbered from 1 (for JSON lines: the line of the file), so that `file:row` finds them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from raytune_vlm.errors import InfrastructureError
from raytune_vlm.sources.base import Shard, shorten
from raytune_vlm.sources.containers import arrow, json_lines, json_list, parquet
from raytune_vlm.sources.containers.raw import Container, RawRow
from raytune_vlm.sources.files import open_binary

CONTAINERS: dict[str, Container] = {
    ".jsonl": json_lines.PLAIN,
    ".ndjson": json_lines.PLAIN,
    ".jsonl.gz": json_lines.GZIPPED,
    ".ndjson.gz": json_lines.GZIPPED,
    ".json": json_list.CONTAINER,
    ".parquet": parquet.CONTAINER,
    ".arrow": arrow.CONTAINER,
}


def container_of(shard: Shard) -> Container:
    """The container of a shard's file, by its suffix."""
    name = shard.path.lower()
    return next(container for suffix, container in CONTAINERS.items() if name.endswith(suffix))


def iterate_rows(shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """All rows of a shard; what cannot be read comes as a row with a reason.

    Raises InfrastructureError only.
    """
    number = 0
    try:
        with open_binary(shard.path) as stream:
            for row in container_of(shard).read(stream, shard, columns):
                number = row.number
                yield row
    except InfrastructureError:
        raise
    except Exception as error:  # each container and file system raises its own
        where = f" after row {number}" if number else ""
        yield RawRow(0, reason=f"unreadable file{where}: {shorten(error, 160)}")


def count_rows(shard: Shard, at_most: int) -> int:
    """Rows of a shard as far as `at_most`; a file that cannot be read counts as one row."""
    if shard.limit is not None:  # known from a footer when the file was cut
        return shard.limit
    return sum(1 for _ in itertools.islice(iterate_rows(shard, ()), at_most))


__all__ = ["CONTAINERS", "RawRow", "container_of", "count_rows", "iterate_rows"]
