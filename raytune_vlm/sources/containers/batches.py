"""Record batches as rows, for the containers that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from raytune_vlm.sources.base import RowError, Shard, shorten
from raytune_vlm.sources.containers.raw import ROWS_PER_SHARD, RawRow


def batch_rows(
    batch: Any, wanted: Sequence[str], number: int, known: tuple[str, ...]
) -> Iterator[RawRow]:
    """The rows of a record batch, numbered after `number`; one at a time becomes Python objects."""
    columns = {name: batch.column(name) for name in wanted}
    for index in range(batch.num_rows):
        number += 1
        try:  # value by value: text that is not UTF-8 fails here, and only its row does
            values = {name: column[index].as_py() for name, column in columns.items()}
        except Exception as error:  # whatever the conversion of foreign bytes raises
            yield RawRow(number, reason=f"unreadable row: {shorten(error, 120)}", columns=known)
            continue
        yield RawRow(number, values, columns=known)


def wanted_columns(schema: Any, columns: Sequence[str]) -> list[str]:
    """Those of the columns that the schema has.

    Raises RowError where one holds an extension type, however deep: reading its values may run
    code. Ray registers a type in its workers whose values are pickles.
    """
    wanted = [name for name in dict.fromkeys(columns) if name in schema.names]
    for name in wanted:
        extension = _extension_in(schema.field(name).type)
        if extension:
            raise RowError(f"column '{name}' holds the extension type '{extension}': not read")
    return wanted


def _extension_in(kind: Any) -> str:
    """The name of the first extension type in a type, or nothing."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        inner = [kind.value_type]
    return next((name for name in map(_extension_in, inner) if name), "")


def runs(shard: Shard, sizes: Sequence[int]) -> Iterator[Shard]:
    """Runs of groups of these sizes with at least ROWS_PER_SHARD rows each, as shards."""
    groups: list[int] = []
    first, rows = 1, 0
    for group, size in enumerate(sizes):
        groups.append(group)
        rows += size
        if rows >= ROWS_PER_SHARD or group == len(sizes) - 1:
            yield replace(shard, row_groups=tuple(groups), first_row=first, limit=rows)
            first, rows, groups = first + rows, 0, []
