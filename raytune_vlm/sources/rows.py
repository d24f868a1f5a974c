"""Rows of a container file, by its suffix: JSON lines (also gzipped), a JSON list, Parquet.

JSON lines and Parquet stream; a JSON list has to be held whole. Rows are numbered from 1 (for JSON
lines: the line of the file), so that `file:row` finds them again.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import SourceConfig
from raytune_vlm.errors import did_you_mean
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import (
    RowError,
    Shard,
    check_counts,
    make_sample,
    number_shards,
    shorten,
)
from raytune_vlm.sources.files import find_files, open_binary
from raytune_vlm.sources.media import load_image

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
SUFFIXES = (*LINE_SUFFIXES, ".json", ".parquet")
"""The containers that are read."""

GROUP_COLUMN = "group_id"
"""A column of this name says what must not be split; it is optional in every format."""

BATCH_ROWS = 64
MAX_LINE_BYTES = 1 << 29
ROWS_PER_SHARD = 512
"""A Parquet file is cut at row groups into shards of at least so many rows."""


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
class Row:
    """A row in the hands of a format."""

    raw: RawRow
    shard: Shard
    limits: ImageLimits

    @property
    def origin(self) -> str:
        return f"{self.shard.shown}:{self.raw.number}"

    def missing(self, name: str) -> str:
        """What to say of a column that is not there, with the nearest that is."""
        return f"no column '{name}'{did_you_mean(name, self.raw.columns or self.raw.values)}"

    def column(self, name: str) -> Any:
        """The value of a column; raises RowError where it is missing or null."""
        if name not in self.raw.values:
            raise RowError(self.missing(name))
        value = self.raw.values[name]
        if value is None:
            raise RowError(f"column '{name}' is null")
        return value

    def text(self, name: str) -> str:
        """The value of a text column; raises RowError where it is missing, null or not text."""
        value = self.column(name)
        if not isinstance(value, str):
            raise RowError(f"column '{name}' must be a string, not {type(value).__name__}")
        return value

    def images(self, name: str) -> list[Any]:
        """The images of an optional column, still unread; a single one counts as a list of one."""
        value = self.raw.values.get(name)
        if value is None:
            return []
        return value if isinstance(value, list) else [value]

    def check_images(self, placeholders: int, name: str) -> None:
        """Raise RowError unless the images column has one image for each placeholder."""
        hint = "" if name in self.raw.values else f" ({self.missing(name)})"
        check_counts(placeholders, len(self.images(name)), hint)

    def sample(self, messages: list[dict[str, Any]], images: Sequence[Any]) -> Sample:
        """The checked sample; raises RowError for messages or images that are refused."""
        group = self.raw.values.get(GROUP_COLUMN)
        if group is not None and (not isinstance(group, str | int) or group == ""):
            raise RowError(f"column '{GROUP_COLUMN}' must be a non-empty string or an integer")
        loaded = [load_image(value, self.shard, self.limits) for value in images]
        return make_sample(
            origin=self.origin,
            messages=messages,
            images=loaded,
            group_id=None if group is None else str(group),
        )


def list_table_shards(config: SourceConfig, root: Path, allow_network: bool) -> list[Shard]:
    """One shard a file, Parquet files in runs of row groups; raises DataError (`find_files`)."""
    shards: list[Shard] = []
    for path, shown, folders in find_files(config.path, root, allow_network, SUFFIXES):
        shard = Shard(path=path, index=0, shown=shown, folders=folders)
        shards.extend(_cut(shard) if path.lower().endswith(".parquet") else [shard])
    return number_shards(shards, config.max_samples, _count)


def read_table(
    config: SourceConfig,
    shard: Shard,
    limits: ImageLimits,
    columns: Sequence[str],
    convert: Callable[[Row], Sample],
) -> Iterator[Sample | Quarantined]:
    """Each row of a shard as a sample, or quarantined with what `convert` says against it."""
    for raw in itertools.islice(iterate_rows(shard, columns), shard.limit):
        row = Row(raw, shard, limits)
        origin = row.origin if raw.number else shard.shown
        result: Sample | Quarantined
        if raw.reason:
            result = Quarantined(origin, raw.reason, config.split)
        else:
            try:
                result = convert(row)
            except RowError as error:
                result = Quarantined(origin, error.message, config.split)
            except Exception as error:  # rows come from others: none may take its neighbours along
                reason = f"unexpected {type(error).__name__}: {shorten(error, 160)}"
                result = Quarantined(origin, reason, config.split)
        yield result


def iterate_rows(shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """All rows of a shard; what cannot be read comes as a row with a reason. Raises nothing."""
    number = 0
    name = shard.path.lower()
    try:
        with open_binary(shard.path) as stream:
            if name.endswith(".parquet"):
                rows = _parquet_rows(stream, shard, (*columns, GROUP_COLUMN))
            elif name.endswith(".json"):
                rows = _json_list(stream)
            else:
                rows = _json_lines(stream, zipped=name.endswith(".gz"))
            for row in rows:
                number = row.number
                yield row
    except Exception as error:  # each container and file system raises its own
        where = f" after row {number}" if number else ""
        yield RawRow(0, reason=f"unreadable file{where}: {shorten(error, 160)}")


def _lines(stream: IO[bytes], *, zipped: bool) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line that is not blank; None for one beyond MAX_LINE_BYTES."""
    source: Any = gzip.GzipFile(fileobj=stream) if zipped else stream
    number = 0
    try:
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
    except (EOFError, zlib.error) as error:
        raise OSError(f"damaged gzip data: {error}") from error


def _json_lines(stream: IO[bytes], *, zipped: bool) -> Iterator[RawRow]:
    for number, line in _lines(stream, zipped=zipped):
        if line is None:
            yield RawRow(number, reason=f"the line has more than {MAX_LINE_BYTES} bytes")
            continue
        try:
            yield _as_row(number, json.loads(line))
        except json.JSONDecodeError as error:
            yield RawRow(number, reason=f"malformed JSON: {error.msg} at column {error.colno}")
        except UnicodeDecodeError as error:
            yield RawRow(number, reason=f"malformed JSON: not UTF-8 at byte {error.start + 1}")
        except (ValueError, RecursionError) as error:
            yield RawRow(number, reason=f"malformed JSON: {shorten(error)}")


def _json_list(stream: IO[bytes]) -> Iterator[RawRow]:
    try:
        value = json.loads(stream.read().removeprefix(b"\xef\xbb\xbf"))
    except json.JSONDecodeError as error:
        hint = "; one object a line? name the file .jsonl" if error.msg == "Extra data" else ""
        where = f"at line {error.lineno} column {error.colno}"
        yield RawRow(0, reason=f"malformed JSON: {error.msg} {where}{hint}")
        return
    if not isinstance(value, list):
        yield RawRow(0, reason=f"a .json file must hold a list, not {type(value).__name__}")
        return
    for number, item in enumerate(value, 1):
        yield _as_row(number, item)


def _as_row(number: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, value)
    return RawRow(number, reason=f"the row must be an object, not {type(value).__name__}")


def _parquet_rows(stream: IO[bytes], shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """The rows of the shard's row groups; a damaged group costs itself, not the others."""
    with pq.ParquetFile(stream) as file:
        known = tuple(file.schema_arrow.names)
        wanted = [name for name in dict.fromkeys(columns) if name in known]
        groups = shard.row_groups
        number = shard.first_row - 1
        for group in range(file.num_row_groups) if groups is None else groups:
            end = number + file.metadata.row_group(group).num_rows
            try:
                for row in _group_rows(file, group, wanted, number, end, known):
                    yield row
                    number = row.number
            except Exception as error:  # damaged pages raise a dozen kinds of errors
                detail = shorten(error, 120)
                yield RawRow(number + 1, reason=f"unreadable rows as far as {end}: {detail}")
            number = end


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
        for index in range(batch.num_rows):
            number += 1
            try:  # value by value: text that is not UTF-8 fails here, and only its row does
                values = {name: batch.column(name)[index].as_py() for name in wanted}
            except Exception as error:  # whatever the conversion of foreign bytes raises
                yield RawRow(number, reason=f"unreadable row: {shorten(error, 120)}", columns=known)
                continue
            yield RawRow(number, values, columns=known)


def _cut(shard: Shard) -> list[Shard]:
    """A Parquet file as shards of whole row groups; a file without a readable footer as it is."""
    try:
        with open_binary(shard.path) as stream, pq.ParquetFile(stream) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except Exception:  # reading the shard will say what is wrong
        return [shard]
    shards: list[Shard] = []
    groups: list[int] = []
    first, rows = 1, 0
    for group, size in enumerate(sizes):
        groups.append(group)
        rows += size
        if rows >= ROWS_PER_SHARD or group == len(sizes) - 1:
            made = Shard(
                path=shard.path,
                index=0,
                shown=shard.shown,
                folders=shard.folders,
                row_groups=tuple(groups),
                first_row=first,
                limit=rows,
            )
            shards.append(made)
            first, rows, groups = first + rows, 0, []
    return shards


def _count(shard: Shard, at_most: int) -> int:
    """Rows of a shard as far as `at_most`; a file that cannot be read counts as one row."""
    if shard.limit is not None:  # set by `_cut` from the footer
        return shard.limit
    return sum(1 for _ in itertools.islice(iterate_rows(shard, ()), at_most))
