"""A file with the features of some images: Arrow IPC, mapped, never changed once it has its name.

One record batch, a row an image. bfloat16 is no Arrow type, so the tensors of an image are bytes
behind each other, and `layout` says in JSON what they are: field of the features -> dtype, shape
and first byte of a tensor, or `list` or `tuple` of such.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raytune_vlm.collate.tower_digest import bytes_of

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("layout", pa.string()),
        ("checksum", pa.uint32()),
        ("data", pa.large_binary()),
    ],
    metadata={"format": "1"},
)
"""`checksum`: CRC-32 of layout and data (3 GB/s: a small part of what a tower takes)."""

_ALIGNED = 64
"""Every tensor begins at a multiple of so many bytes."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple}

Packed = tuple[str, list[Any]]
"""Features as a layout and pieces of bytes."""


class Segment:
    """A mapped file.

    Raises
    ------
    ValueError
        If it is torn, or holds something else.
    OSError
        If it is gone, or cannot be mapped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        size = file.stat().st_size
        try:
            # A private mapping: whoever wrote into it would change a copy of its own.
            self._bytes = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            file.stat()  # gone meanwhile?
            raise OSError(str(error)) from error
        try:
            reader = pa.ipc.open_file(pa.py_buffer(self._bytes.numpy()))
            if not reader.schema.equals(SCHEMA, check_metadata=True):
                raise ValueError("it holds something else")
            self._batch = reader.get_batch(0)
            self._batch.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(str(error)) from error
        self._checked: set[int] = set()

    @property
    def keys(self) -> list[bytes]:
        """The key of each row."""
        keys: list[bytes] = self._batch.column("key").to_pylist()
        return keys

    def at(self, row: int) -> tuple[str, torch.Tensor]:
        """Layout and bytes of a row, a view; ValueError if they are not what was written."""
        _, offsets, data = self._batch.column("data").buffers()
        # By address: the buffer of a scalar would be a copy.
        first, end = np.frombuffer(offsets, np.int64, 2, 8 * row).tolist()
        start = data.address - self._bytes.data_ptr()
        layout: str = self._batch.column("layout")[row].as_py()
        entry = self._bytes[start + first : start + end]
        if row not in self._checked:
            if _checksum(layout, [entry.numpy()]) != self._batch.column("checksum")[row].as_py():
                raise ValueError(f"the bytes of row {row} are not those that were written")
            self._checked.add(row)
        return layout, entry


def write_segment(file: Path, entries: Mapping[bytes, Any]) -> None:
    """Write features by their keys, under a temporary name until all is on the disk.

    Raises
    ------
    OSError
        If there is no room; nothing is left behind.
    """
    temporary = file.with_name(f".{file.name}")
    batch = _batch(entries)
    try:
        with temporary.open("xb") as stream:
            with pa.ipc.new_file(stream, SCHEMA) as writer:
                writer.write_batch(batch)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _batch(entries: Mapping[bytes, Any]) -> pa.RecordBatch:
    layouts, checksums, data, ends = [], [], [], [0]
    for features in entries.values():
        layout, parts = packed(features)
        layouts.append(layout)
        checksums.append(_checksum(layout, parts))
        data += parts
        ends.append(ends[-1] + sum(map(len, parts)))
    offsets = pa.py_buffer(np.array(ends, np.int64))
    buffers = [None, offsets, pa.py_buffer(b"".join(data))]  # the one copy
    key, text, number, binary = SCHEMA.types
    columns = [
        pa.array(list(entries), key),
        pa.array(layouts, text),
        pa.array(checksums, number),
        pa.Array.from_buffers(binary, len(entries), buffers),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _checksum(layout: str, parts: Sequence[Any]) -> int:
    found = zlib.crc32(layout.encode())
    for part in parts:
        found = zlib.crc32(part, found)
    return found


def packed(features: Any) -> Packed:
    """Features (a `ModelOutput`) as they are written; the pieces are views."""
    parts: list[Any] = []
    at = 0

    def place(value: Any) -> Any:
        nonlocal at
        if not isinstance(value, torch.Tensor):
            return {type(value).__name__: [place(entry) for entry in value]}
        entry = [str(value.dtype).removeprefix("torch."), list(value.shape), at]
        piece = bytes_of(value)
        parts.extend((piece, bytes(-len(piece) % _ALIGNED)))
        at += sum(map(len, parts[-2:]))
        return entry

    return json.dumps({name: place(value) for name, value in features.items()}), parts


def unpacked(kind: Any, layout: str, entry: torch.Tensor) -> Any:
    """Features of a class, as views of the bytes of a row."""

    def value(node: Any) -> Any:
        if isinstance(node, dict):
            ((name, nodes),) = node.items()
            return _CONTAINERS[name](value(inner) for inner in nodes)
        name, shape, at = node
        dtype = _DTYPES[name]
        end = at + int(np.prod(shape)) * dtype.itemsize
        return entry[at:end].view(dtype).view(shape)

    return kind(**{name: value(node) for name, node in json.loads(layout).items()})
