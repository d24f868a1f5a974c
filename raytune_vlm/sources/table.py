"""`table`: rows of JSON lines, JSON, Parquet or Arrow through a function of your own.

    # my_package/my_rows.py
    def row(values: dict, options: dict) -> dict | None:
        return {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": values["name"]},
            ],
            "images": [values["photo"]],
            "group_id": values["shop"],
            "id": values["number"],
        }

    # experiment.yaml
    sources:
      - type: table
        path: hf://datasets/owner/name
        function: my_package.my_rows:row
        columns: [photo, name, shop, number]

What the function returns is in the layout of `messages`; `group_id` and `id` are optional, and
None leaves the row out. With `id`, or else the file's name and the row's number, two rows of the
same content are two samples. The module must be importable on every worker. The data is prepared
anew when the function's module changes, not when another module does.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import MessagesSource, TableFunctionSource
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, RowError, Shard, attempt
from raytune_vlm.sources.containers import iterate_rows
from raytune_vlm.sources.containers.raw import as_row
from raytune_vlm.sources.messages import convert
from raytune_vlm.sources.python import import_function, module_of
from raytune_vlm.sources.rows import Row, list_table_shards

_MESSAGES = MessagesSource(type="messages", path="")


def list_shards(config: TableFunctionSource, root: Path, allow_network: bool) -> list[Shard]:
    """The files, each known with the function's module; raises DataError (`find_files`)."""
    code = hashlib.blake2b(module_of(import_function(config.function)), digest_size=16).hexdigest()
    shards = list_table_shards(config, root, allow_network)
    return [replace(shard, details=code) for shard in shards]


def read_shard(
    config: TableFunctionSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The rows of a shard that the function does not leave out."""
    function: Any = import_function(config.function)
    for raw in itertools.islice(iterate_rows(shard, config.columns), shard.limit):
        row = Row(raw, shard, limits)
        if raw.reason:
            yield Quarantined(row.origin if raw.number else shard.shown, raw.reason, config.split)
            continue
        left_out: list[bool] = []
        found = attempt(row.origin, config.split, partial(_sample, config, row, function, left_out))
        if not left_out:
            yield found


def _sample(config: TableFunctionSource, row: Row, function: Any, left_out: list[bool]) -> Sample:
    for name in config.columns:
        if name not in row.raw.values:
            raise RowError(row.missing(name))
    value = function(dict(row.raw.values), dict(config.options))
    if value is None:
        left_out.append(True)
        raise RowError("left out")
    own = value.pop("id", None)
    made = replace(row, raw=as_row(row.raw.number, value))
    if made.raw.reason:
        raise RowError(made.raw.reason)
    sample = convert(_MESSAGES, made)
    name = f"{posixpath.basename(row.shard.path)}:{row.raw.number}" if own is None else str(own)
    content = hashlib.sha256(f"{sample.sample_id}/{name}".encode("utf-8", "replace"))
    return replace(sample, sample_id=content.hexdigest()[:16])


READER = Reader(list_shards, read_shard)
