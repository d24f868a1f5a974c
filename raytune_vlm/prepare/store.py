"""The prepared store: samples as the model takes them, in memory-mapped Arrow IPC files.

Two folders a shard of the source, each written under a temporary name and renamed when whole:

    <key>/           <split>.arrow: token ids, labelled spans, small tensors, the encoded images
                     index.arrow, summary.json
    <key>.pixels/    <split>.arrow: the uint8 pixels of the same rows; only in the `pixels` tier

Both are content-addressed and shared by all trials, workers and sweeps through the page cache.
Where there are no pixels, the images are decoded when a sample is asked for: the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.errors import DataError
from raytune_vlm.records import SPLITS

BATCH_ROWS = 1024
BATCH_BYTES = 16 * 2**20
"""An Arrow record batch is written as soon as it has so many rows or bytes: few enough to hold a
view of each, small enough to be held in memory while it is filled."""

TENSOR_TYPE = pa.struct(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("data", pa.large_binary()),
    ]
)
SAMPLE_FIELDS = [
    ("input_ids", pa.large_binary()),
    ("spans", pa.list_(pa.int32())),
    ("tensors", pa.list_(TENSOR_TYPE)),
    ("images", pa.list_(pa.large_binary())),
]
"""What training needs of a sample when its pixels are made elsewhere."""
ROW_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("group_id", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("conversation", pa.string()),
        *SAMPLE_FIELDS,
    ]
)
"""`conversation`, of prompts only: their messages and tools as JSON, to be encoded again with other
images."""
PIXEL_SCHEMA = pa.schema([("tensors", pa.list_(TENSOR_TYPE))])
INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("source", pa.int32()),
        ("sample_id", pa.string()),
        ("group_id", pa.string()),
        ("images_id", pa.string()),
        ("picture_hashes", pa.list_(pa.uint64())),
        ("words_id", pa.string()),
        ("origin", pa.string()),
        ("length", pa.int32()),
        ("num_labelled", pa.int32()),
        ("num_media", pa.int32()),
        ("num_images", pa.int32()),
        ("num_bytes", pa.int64()),
        ("num_pixel_bytes", pa.int64()),
        ("truncated", pa.bool_()),
    ]
)
SPLIT_COLUMNS = (
    "split",
    "shard",
    "row",
    "source",
    "sample_id",
    "group_id",
    "length",
    "num_labelled",
    "num_images",
    "num_bytes",
)
"""What `PreparedSplit` needs of the index."""

PixelDecoder = Callable[[Sequence[bytes]], dict[str, np.ndarray]]
"""Encoded images of a sample -> its pixel tensors (`collate.pixels.PixelMaker.decode`)."""


def encoded_to_row(encoded: Encoded) -> dict[str, Any]:
    """The columns of `ROW_SCHEMA` that hold tokens, spans and small tensors."""
    return {
        "input_ids": encoded.input_ids.astype(np.int32).tobytes(),
        "spans": [bound for span in encoded.spans for bound in span],
        "tensors": tensor_entries(encoded.tensors),
    }


def tensor_entries(tensors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Named arrays as a list of `TENSOR_TYPE`."""
    return [
        {
            "name": name,
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "data": np.ascontiguousarray(array).tobytes(),
        }
        for name, array in sorted(tensors.items())
    ]


def tensors_at(column: Any, place: int) -> dict[str, np.ndarray]:
    """The arrays at a place of a `list<TENSOR_TYPE>` array: read-only copies of its bytes."""
    entries = column[place].values
    if entries is None:
        return {}
    names, shapes = entries.field("name").to_pylist(), entries.field("shape").to_pylist()
    dtypes, data = entries.field("dtype").to_pylist(), entries.field("data")
    return {
        name: np.frombuffer(data[number].as_buffer(), dtype=dtypes[number]).reshape(shapes[number])
        for number, name in enumerate(names)
    }


def sample_at(batch: Any, place: int) -> Encoded:
    """The sample at a place of a record batch with `SAMPLE_FIELDS`, without pixels."""
    spans = batch.column("spans")[place].as_py()
    return Encoded(
        input_ids=np.frombuffer(batch.column("input_ids")[place].as_buffer(), dtype=np.int32),
        spans=list(zip(spans[::2], spans[1::2], strict=True)),
        tensors=tensors_at(batch.column("tensors"), place),
    )


class RowWriter:
    """An Arrow IPC file that grows by a record batch at a time."""

    def __init__(self, file: Path, schema: pa.Schema = ROW_SCHEMA) -> None:
        self.num_rows = 0
        self._schema = schema
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row with the columns of the schema."""
        self._pending.append(row)
        self._pending_bytes += _num_bytes(row)
        self.num_rows += 1
        if len(self._pending) == BATCH_ROWS or self._pending_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            batch = pa.RecordBatch.from_pylist(self._pending, schema=self._schema)
            self._writer.write_batch(batch)
            self._pending, self._pending_bytes = [], 0


def _num_bytes(row: dict[str, Any]) -> int:
    """What images and tensors of a row weigh; all else is small."""
    tensors = sum(len(entry["data"]) for entry in row["tensors"])
    return tensors + sum(map(len, row.get("images", ())))


@dataclass(frozen=True)
class _Rows:
    """The rows of an Arrow file: a view of each record batch, and the row that each begins with."""

    batches: list[Any]
    starts: list[int]

    @classmethod
    def of(cls, file: Path) -> _Rows:
        batches = _batches(file)
        starts = [0, *accumulate(batch.num_rows for batch in batches)]
        return cls(batches, starts[:-1])

    def at(self, row: int) -> tuple[Any, int]:
        """The batch that holds a row, and its place there."""
        number = bisect_right(self.starts, row) - 1
        return self.batches[number], row - self.starts[number]


class PreparedSplit:
    """The samples of one split, by row number, in the order of the sources.

    Parameters
    ----------
    store
        Folder of the prepared shards.
    index
        `SPLIT_COLUMNS` of the index, all rows of this split.
    decode
        Makes pixels where the store has none.
    """

    def __init__(self, store: Path, index: pa.Table, decode: PixelDecoder | None = None) -> None:
        self._store, self._decode = store, decode
        self._ids = index.select(["sample_id", "group_id"])
        shards = index["shard"].combine_chunks().dictionary_encode()
        self._shards: list[str] = shards.dictionary.to_pylist()
        self._shard_numbers = shards.indices.to_numpy(zero_copy_only=False)
        self._rows = index["row"].to_numpy()
        self._files: dict[tuple[str, str], _Rows] = {}
        self.split: str = index["split"][0].as_py() if len(index) else ""
        self.lengths = index["length"].to_numpy()
        self.num_labelled = index["num_labelled"].to_numpy()
        self.sources = index["source"].to_numpy()
        self.num_images = index["num_images"].to_numpy()
        self.num_bytes = index["num_bytes"].to_numpy()
        """What each sample weighs with its images still encoded."""

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def sample_ids(self) -> list[str]:
        """The id of each row."""
        ids: list[str] = self._ids["sample_id"].to_pylist()
        return ids

    @cached_property
    def group_ids(self) -> list[str]:
        """The group of each row."""
        ids: list[str] = self._ids["group_id"].to_pylist()
        return ids

    def encoded(self, number: int) -> Encoded:
        """The encoded sample of a row; what is stored comes as views of the memory map.

        Raises
        ------
        DataError
            If its pixels are not stored and there is no `decode`.
        """
        batch, place = self._locate(number)
        sample = sample_at(batch, place)
        pixels = self._pixels(number)
        if pixels is None:
            images = batch.column("images")[place].as_py()
            if images and self._decode is None:
                raise DataError(f"{self._store}: the pixels of {self.split} are not stored")
            pixels = self._decode(images) if images and self._decode else {}
        return Encoded(sample.input_ids, sample.spans, {**sample.tensors, **pixels})

    def samples(self, rows: Sequence[int]) -> pa.Table:
        """`SAMPLE_FIELDS` of some rows, in their order: what `streaming` sends to the workers."""
        names = [name for name, _ in SAMPLE_FIELDS]
        pieces = []
        for number in rows:
            batch, place = self._locate(number)
            pieces.append(batch.select(names).slice(place, 1))
        return pa.Table.from_batches(pieces, schema=pa.schema(SAMPLE_FIELDS))

    def text(self, number: int, column: str) -> str:
        """`prompt` or `reference` of a row."""
        batch, place = self._locate(number)
        value: str = batch.column(column)[place].as_py()
        return value

    def conversation(self, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Messages and tools of a prompt.

        Raises
        ------
        DataError
            If the store does not hold them: training samples have none.
        """
        batch, place = self._locate(number)
        held = "conversation" in batch.schema.names and batch.column("conversation")[place].as_py()
        if not held:
            raise DataError(f"{self._store}: the messages of {self.split} are not stored")
        value = json.loads(held)
        return value["messages"], value["tools"]

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a row."""
        batch, place = self._locate(number)
        images: list[bytes] = batch.column("images")[place].as_py()
        return images

    def fixed_choice(self, limit: int | None) -> list[int]:
        """At most `limit` rows in order: those whose ids hash lowest, always the same ones."""
        rows = list(range(len(self)))
        if limit is None or limit >= len(rows):
            return rows
        key = [hashlib.sha256(self.sample_ids[row].encode()).digest() for row in rows]
        return sorted(sorted(rows, key=lambda row: key[row])[:limit])

    def _locate(self, number: int) -> tuple[pa.RecordBatch, int]:
        return self._read(self._shards[self._shard_numbers[number]], int(self._rows[number]))

    def _pixels(self, number: int) -> dict[str, np.ndarray] | None:
        """The stored pixels of a row; None where the shard has none."""
        folder = pixel_folder(self._shards[self._shard_numbers[number]])
        if (folder, self.split) not in self._files and not (self._store / folder).is_dir():
            return None
        batch, place = self._read(folder, int(self._rows[number]))
        return tensors_at(batch.column("tensors"), place)

    def _read(self, folder: str, row: int) -> tuple[pa.RecordBatch, int]:
        name = (folder, self.split)
        if name not in self._files:
            self._files[name] = _Rows.of(self._store / folder / f"{self.split}.arrow")
        return self._files[name].at(row)


def pixel_folder(shard: str) -> str:
    """The name of the folder that holds a shard's pixels."""
    return f"{shard}.pixels"


def open_split(
    store: Path | str,
    index_file: Path | str,
    split: str,
    decode: PixelDecoder | None = None,
) -> PreparedSplit:
    """One split of prepared data.

    Raises
    ------
    DataError
        If the index is not there (the prepared data was deleted).
    """
    if not Path(index_file).exists():
        raise DataError(f"{index_file} is gone: run `raytune-vlm prepare` again")
    # Views of the memory map: what workers have in common, they share.
    parts = [part for part in _batches(Path(index_file)) if part["split"][0].as_py() == split]
    table = pa.Table.from_batches(parts, schema=INDEX_SCHEMA).select(SPLIT_COLUMNS)
    return PreparedSplit(Path(store), table, decode)


def write_index(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of `INDEX_SCHEMA`."""
    write_index_table(file, pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA))


def write_index_table(file: Path, index: pa.Table) -> None:
    """Write a table of `INDEX_SCHEMA`, in one record batch a split."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        for split in SPLITS:
            rows = index.filter(pc.equal(index["split"], split)).combine_chunks()
            writer.write_table(rows)


def read_index(file: Path) -> pa.Table:
    """An index from its file, split after split."""
    return pa.Table.from_batches(_batches(file), schema=INDEX_SCHEMA)


def _batches(file: Path) -> list[Any]:
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]
