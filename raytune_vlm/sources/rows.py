"""A row in the hands of a format, and the loop that turns the rows of a table into samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import SourceConfig, TableSource
from raytune_vlm.errors import did_you_mean
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import (
    RowError,
    Shard,
    attempt,
    check_counts,
    make_sample,
    number_shards,
)
from raytune_vlm.sources.containers import (
    CONTAINERS,
    RawRow,
    container_of,
    count_rows,
    iterate_rows,
)
from raytune_vlm.sources.hugging_face import find_tables
from raytune_vlm.sources.media import load_image

SUFFIXES = tuple(CONTAINERS)
"""The containers that are read."""

GROUP_COLUMN = "group_id"
"""A column of this name says what must not be split; it is optional in every format."""


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

    def turns(self, name: str) -> list[Any]:
        """The value of a column of turns; raises RowError where it is no list.

        `datasets` stores a sequence of objects as an object of lists: that is turned around.
        """
        value = self.column(name)
        if isinstance(value, dict) and all(isinstance(item, list) for item in value.values()):
            try:
                value = [
                    dict(zip(value, turn, strict=True))
                    for turn in zip(*value.values(), strict=True)
                ]
            except ValueError:
                raise RowError(f"column '{name}': its lists differ in length") from None
        if not isinstance(value, list):
            raise RowError(f"column '{name}' must be a list, not {type(value).__name__}")
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

    def load(self, image: Any) -> bytes:
        """The bytes of an image of the row; raises RowError."""
        return load_image(image, self.shard, self.limits)

    def sample(
        self,
        messages: list[dict[str, Any]],
        images: Sequence[Any],
        tools: list[dict[str, Any]] | None = None,
        group_id: str | None = None,
    ) -> Sample:
        """The checked sample; raises RowError for messages or images that are refused.

        `group_id` holds where the row has no column of that name.
        """
        group = self.raw.values.get(GROUP_COLUMN)
        if group is not None and (not isinstance(group, str | int) or group == ""):
            raise RowError(f"column '{GROUP_COLUMN}' must be a non-empty string or an integer")
        loaded = [self.load(image) for image in images]
        return make_sample(
            origin=self.origin,
            messages=messages,
            images=loaded,
            group_id=group_id if group is None else str(group),
            tools=tools,
        )


def list_table_shards(config: TableSource, root: Path, allow_network: bool) -> list[Shard]:
    """The files of a source, cut where their container can be; raises DataError (`find_files`)."""
    return cut_tables(find_tables(config, root, allow_network, SUFFIXES), config.max_samples)


def cut_tables(files: Sequence[Shard], max_samples: int | None) -> list[Shard]:
    """Table files as numbered shards."""
    pieces = (piece for file in files for piece in container_of(file).cut(file))
    return number_shards(pieces, max_samples, count_rows)


def read_table(
    config: SourceConfig,
    shard: Shard,
    limits: ImageLimits,
    columns: Sequence[str],
    convert: Callable[[Row], Sample],
) -> Iterator[Sample | Quarantined]:
    """Each row of a shard as a sample, or quarantined with what `convert` says against it."""
    rows = iterate_rows(shard, (*columns, GROUP_COLUMN))
    for raw in itertools.islice(rows, shard.limit):
        row = Row(raw, shard, limits)
        if raw.reason:
            yield Quarantined(row.origin if raw.number else shard.shown, raw.reason, config.split)
        else:
            yield attempt(row.origin, config.split, partial(convert, row))
