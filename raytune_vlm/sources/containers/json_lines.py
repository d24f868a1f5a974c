"""JSON lines, plain or gzipped.

A plain local file is cut into byte ranges at line ends, each with the hash of its content, so that
several tasks read a large file, and appending to it changes nothing but its last ranges.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np

from raytune_vlm.sources.base import Shard, shorten
from raytune_vlm.sources.containers.raw import (
    ROWS_PER_SHARD,
    Container,
    RawRow,
    as_row,
    whole,
)
from raytune_vlm.sources.files import open_binary
from raytune_vlm.sources.remote import is_remote

MAX_LINE_BYTES = 1 << 29
PIECE_BYTES = 16 << 20
"""A shard ends at the first line end after so many bytes, or after ROWS_PER_SHARD lines."""

_CHUNK_BYTES = 1 << 20
_NEWLINE = ord("\n")


def cut(shard: Shard) -> Iterator[Shard]:
    """A local file in byte ranges, each with the number of its first line and its hash."""
    if is_remote(shard.path):
        yield shard
        return
    rest = shard
    try:
        with open_binary(shard.path) as stream:
            for start, end, first_row, digest in _pieces(stream):
                yield replace(shard, start=start, end=end, first_row=first_row, digest=digest)
                rest = replace(shard, start=end, first_row=first_row)
    except OSError:  # reading the shard will say what is wrong
        yield rest


def _pieces(stream: IO[bytes]) -> Iterator[tuple[int, int, int, str]]:
    """Start, end, number of the first line and hash of each range; one for an empty file."""
    start = position = lines = 0
    first_row = 1
    digest = hashlib.blake2b(digest_size=16)
    while chunk := stream.read(_CHUNK_BYTES):
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE) + 1
        taken = passed = 0
        while True:
            by_lines = passed + ROWS_PER_SHARD - lines - 1
            by_bytes = max(passed, int(np.searchsorted(ends, start + PIECE_BYTES - position)))
            last = min(by_lines, by_bytes)
            if last >= len(ends):
                break
            cut_at = int(ends[last])
            digest.update(memoryview(chunk)[taken:cut_at])
            yield start, position + cut_at, first_row, digest.hexdigest()
            first_row += lines + last - passed + 1
            start, lines, taken, passed = position + cut_at, 0, cut_at, last + 1
            digest = hashlib.blake2b(digest_size=16)
        digest.update(memoryview(chunk)[taken:])
        lines += len(ends) - passed
        position += len(chunk)
    if position > start or position == 0:
        yield start, position, first_row, digest.hexdigest()


class _Piece:
    """A byte range of a file, hashed while it is read."""

    def __init__(self, stream: IO[bytes], shard: Shard) -> None:
        stream.seek(shard.start)
        self._stream, self._expected = stream, shard.digest
        self._left = None if shard.end is None else shard.end - shard.start
        self._digest = hashlib.blake2b(digest_size=16)

    def readline(self, most: int) -> bytes:
        line = self._stream.readline(most if self._left is None else min(most, self._left))
        if self._left is not None:
            self._left -= len(line)
            self._digest.update(line)
        return line

    @property
    def has_changed(self) -> bool:
        """Whether what was read is not what was cut; to be asked at the end."""
        return self._left is not None and self._digest.hexdigest() != self._expected


def read_plain(stream: IO[bytes], shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """The lines of a byte range."""
    piece = _Piece(stream, shard)
    yield from _rows(piece, shard.first_row)
    if piece.has_changed:
        raise OSError("the file has changed since it was listed")


def read_gzipped(stream: IO[bytes], shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """The lines of a gzipped file."""
    try:
        yield from _rows(gzip.GzipFile(fileobj=stream), 1)
    except (EOFError, zlib.error) as error:
        raise OSError(f"damaged gzip data: {error}") from error


def _rows(source: Any, first_row: int) -> Iterator[RawRow]:
    for number, line in _lines(source, first_row):
        if line is None:
            yield RawRow(number, reason=f"the line has more than {MAX_LINE_BYTES} bytes")
            continue
        try:
            yield as_row(number, json.loads(line))
        except json.JSONDecodeError as error:
            yield RawRow(number, reason=f"malformed JSON: {error.msg} at column {error.colno}")
        except UnicodeDecodeError as error:
            yield RawRow(number, reason=f"malformed JSON: not UTF-8 at byte {error.start + 1}")
        except (ValueError, RecursionError) as error:
            yield RawRow(number, reason=f"malformed JSON: {shorten(error)}")


def _lines(source: Any, first_row: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line that is not blank; None for one beyond MAX_LINE_BYTES."""
    number = first_row - 1
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := source.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, line


PLAIN = Container(read_plain, cut)
GZIPPED = Container(read_gzipped, whole)
