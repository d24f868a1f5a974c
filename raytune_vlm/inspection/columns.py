"""The columns of a data file, from its first row or its schema, and which of them hold turns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from raytune_vlm.errors import DataError
from raytune_vlm.inspection.text import line

Kind = Literal["from/value turns", "role/content turns", "other"]
"""What a column holds: conversations in one of two spellings, or anything else."""

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json", ".parquet", ".arrow")
"""The containers that are looked into: those of `raytune_vlm.sources.containers`."""

MAX_ROW_BYTES = 1 << 26
NUM_LINES = 20
"""So many lines are tried for one that is a row."""


def columns_of(file: Path) -> dict[str, Kind]:
    """Name -> kind of each column of a file of one of the `SUFFIXES`.

    Raises
    ------
    DataError
        If the file cannot be read or holds no row; the message goes on from the file's name.
    """
    name = file.name.lower()
    try:
        if name.endswith(".parquet"):
            return _of_schema(pyarrow.parquet.read_schema(file))
        if name.endswith(".arrow"):
            return _of_schema(_arrow_schema(file))
        if name.endswith(".json"):
            with file.open("rb") as stream:
                return _of_row(_first_of_list(stream))
        with file.open("rb") as stream:
            unzipped: Any = gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream
            return _of_row(_first_line(unzipped))
    except DataError:
        raise
    except Exception as error:  # damaged gzip data and Parquet footers raise a dozen kinds
        raise DataError(f"cannot be read: {line(error, 160)}") from error


def _of_row(row: Mapping[str, Any]) -> dict[str, Kind]:
    return {str(name): _kind_of_value(value) for name, value in row.items()}


def _kind_of_value(value: Any) -> Kind:
    first = value[0] if isinstance(value, list) and value else None
    return _kind_of_keys(first) if isinstance(first, dict) else "other"


def _kind_of_keys(keys: Any) -> Kind:
    if "from" in keys and "value" in keys:
        return "from/value turns"
    return "role/content turns" if "role" in keys and "content" in keys else "other"


def _of_schema(schema: Any) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for column in schema:
        kinds[str(column.name)] = "other"
        is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
        if is_list and pyarrow.types.is_struct(column.type.value_type):
            keys = [inner.name for inner in column.type.value_type]
            kinds[str(column.name)] = _kind_of_keys(keys)
    return kinds


def _arrow_schema(file: Path) -> Any:
    """The schema of an Arrow file in either of its two forms."""
    with pyarrow.memory_map(str(file)) as source:
        try:
            return pyarrow.ipc.open_stream(source).schema
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).schema


def _first_line(stream: IO[bytes]) -> dict[str, Any]:
    """The first of some lines that holds a row; raises DataError where none does."""
    reason = "holds no row"
    for _ in range(NUM_LINES):
        text = stream.readline(MAX_ROW_BYTES)
        if not text:
            break
        text = text.removeprefix(b"\xef\xbb\xbf").strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            reason = "holds no row: its first lines are malformed JSON"
            continue
        if isinstance(row, dict):
            return row
        reason = f"holds no row: a line is {type(row).__name__}, not an object"
    raise DataError(reason)


def _first_of_list(stream: IO[bytes]) -> dict[str, Any]:
    """The first item of a JSON list, reading no more of the file than that takes."""
    size = 1 << 20
    while True:
        stream.seek(0)
        data = stream.read(size)
        text = data.decode("utf-8-sig", "replace").lstrip()
        if text and not text.startswith("["):
            kind = "an object" if text.startswith("{") else "a value"
            raise DataError(f"holds {kind}, not a list of rows")
        try:
            row, _ = json.JSONDecoder().raw_decode(text[1:].lstrip() or "?")
        except (ValueError, RecursionError):
            if len(data) < size or size >= MAX_ROW_BYTES:
                what = text[1:].lstrip()
                reason = "" if not what or what.startswith("]") else ": malformed JSON"
                raise DataError(f"holds no row{reason}") from None
            size *= 4
            continue
        if not isinstance(row, dict):
            raise DataError(f"holds {type(row).__name__} values, not objects")
        return row
