"""What every container gives: raw rows, by number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from raytune_vlm.sources.base import Shard

ROWS_PER_SHARD = 512
"""A file that can be cut is cut into shards of at least so many rows."""


@dataclass(frozen=True)
class RawRow:
    """A row as the container holds it, or (`reason`) what is wrong with it."""

    number: int
    """0 where the trouble is the file's, not a row's."""
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    columns: tuple[str, ...] = ()
    """All columns of the file, those that were not read too; empty: the keys of `values`."""


@dataclass(frozen=True)
class Container:
    """The contract of a container format."""

    read: Callable[[IO[bytes], Shard, Sequence[str]], Iterator[RawRow]]
    """The rows of a shard, of at least the columns that are named; streams. It raises where the
    rest of the shard cannot be read."""
    cut: Callable[[Shard], Iterator[Shard]]
    """A file as shards; one that cannot be read as it is, because reading it will say why."""


def whole(shard: Shard) -> Iterator[Shard]:
    """`cut` of a container that is not cut."""
    yield shard


def as_row(number: int, value: Any) -> RawRow:
    """A JSON value as a row."""
    if isinstance(value, dict):
        return RawRow(number, value)
    return RawRow(number, reason=f"the row must be an object, not {type(value).__name__}")
