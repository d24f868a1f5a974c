"""The prepared store: samples as the model takes them, in memory-mapped Arrow IPC files.

Written once, one folder a shard of the source; read by all trials, workers and sweeps of a machine
through the page cache. Pixels are uint8; reading a sample copies nothing but its small columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raytune_vlm.collate.encode import Encoded
from raytune_vlm.errors import DataError

ROWS_PER_BATCH = 32
"""Rows of one Arrow record batch; all but the last of a file are full."""

TENSOR_TYPE = pa.struct(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("data", pa.large_binary()),
    ]
)
ROW_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("group_id", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("input_ids", pa.large_binary()),
        ("spans", pa.list_(pa.int32())),
        ("tensors", pa.list_(TENSOR_TYPE)),
        ("thumbnail", pa.binary()),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("sample_id", pa.string()),
        ("group_id", pa.string()),
        ("origin", pa.string()),
        ("length", pa.int32()),
        ("num_labelled", pa.int32()),
        ("num_images", pa.int32()),
    ]
)


def encoded_to_row(encoded: Encoded) -> dict[str, Any]:
    """The columns of `ROW_SCHEMA` that hold an encoded sample."""
    return {
        "input_ids": encoded.input_ids.astype(np.int32).tobytes(),
        "spans": [bound for span in encoded.spans for bound in span],
        "tensors": [tensor_entry(name, array) for name, array in sorted(encoded.tensors.items())],
    }


def tensor_entry(name: str, array: np.ndarray) -> dict[str, Any]:
    """A named array as a value of `TENSOR_TYPE`."""
    return {
        "name": name,
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "data": np.ascontiguousarray(array).tobytes(),
    }


def array_of(entries: Any, place: int) -> np.ndarray:
    """The array at a place of a struct array of `TENSOR_TYPE`: a read-only view, nothing copied."""
    data = entries.field("data")[place].as_buffer()
    array = np.frombuffer(data, dtype=np.dtype(entries.field("dtype")[place].as_py()))
    return array.reshape(entries.field("shape")[place].as_py())


class RowWriter:
    """An Arrow IPC file of `ROW_SCHEMA` that grows by a record batch at a time."""

    def __init__(self, file: Path) -> None:
        self.num_rows = 0
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, ROW_SCHEMA)
        self._pending: list[dict[str, Any]] = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row with the columns of `ROW_SCHEMA`."""
        self._pending.append(row)
        self.num_rows += 1
        if len(self._pending) == ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            batch = pa.RecordBatch.from_pylist(self._pending, schema=ROW_SCHEMA)
            self._writer.write_batch(batch)
            self._pending = []


class PreparedSplit:
    """The samples of one split, by row number, in the order of the sources.

    Parameters
    ----------
    store
        Folder of the prepared shards.
    index
        Rows of `INDEX_SCHEMA`, all of this split.
    """

    def __init__(self, store: Path, index: pa.Table) -> None:
        self._store = store
        self._files: dict[str, Any] = {}
        self._shards = index["shard"].to_pylist()
        self._rows = index["row"].to_numpy()
        self.split: str = index["split"][0].as_py() if len(index) else ""
        self.sample_ids: list[str] = index["sample_id"].to_pylist()
        self.group_ids: list[str] = index["group_id"].to_pylist()
        self.lengths = index["length"].to_numpy()
        self.num_labelled = index["num_labelled"].to_numpy()

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps do not travel: each process opens its own."""
        return {**self.__dict__, "_files": {}}

    def encoded(self, number: int) -> Encoded:
        """The encoded sample of a row; arrays are views of the memory map (read-only)."""
        batch, place = self._locate(number)
        spans = batch.column("spans")[place].as_py()
        tensors = batch.column("tensors")[place].values
        names = tensors.field("name").to_pylist()
        return Encoded(
            input_ids=np.frombuffer(batch.column("input_ids")[place].as_buffer(), dtype=np.int32),
            spans=list(zip(spans[::2], spans[1::2], strict=True)),
            tensors={name: array_of(tensors, place) for place, name in enumerate(names)},
        )

    def text(self, number: int, column: str) -> str:
        """`prompt` or `reference` of a row."""
        batch, place = self._locate(number)
        value: str = batch.column(column)[place].as_py()
        return value

    def thumbnail(self, number: int) -> bytes | None:
        """A small JPEG of the row's first image, if one was kept."""
        batch, place = self._locate(number)
        value: bytes | None = batch.column("thumbnail")[place].as_py()
        return value

    def _locate(self, number: int) -> tuple[pa.RecordBatch, int]:
        shard = self._shards[number]
        if shard not in self._files:
            file = self._store / shard / f"{self.split}.arrow"
            self._files[shard] = pa.ipc.open_file(pa.memory_map(str(file)))
        batch, place = divmod(int(self._rows[number]), ROWS_PER_BATCH)
        return self._files[shard].get_batch(batch), place

    def fixed_choice(self, limit: int | None) -> list[int]:
        """At most `limit` rows in order: those whose ids hash lowest, always the same ones."""
        rows = list(range(len(self)))
        if limit is None or limit >= len(rows):
            return rows
        key = [hashlib.sha256(self.sample_ids[row].encode()).digest() for row in rows]
        return sorted(sorted(rows, key=lambda row: key[row])[:limit])


def open_split(store: Path | str, index_file: Path | str, split: str) -> PreparedSplit:
    """One split of prepared data.

    Raises
    ------
    DataError
        If the index is not there (the prepared data was deleted).
    """
    if not Path(index_file).exists():
        raise DataError(f"{index_file} is gone: run `raytune-vlm prepare` again")
    table = pq.read_table(index_file, filters=[("split", "==", split)])
    return PreparedSplit(Path(store), table)


def write_index(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of `INDEX_SCHEMA` as Parquet."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA), file)


def read_index(file: Path) -> list[dict[str, Any]]:
    """The rows that `write_index` wrote."""
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows
