"""`cord`: documents in the layout of CORD-v2 and Donut.

The ground truth is a JSON text (or an object) with `gt_parse`, one parse of the document, or
`gt_parses`, several: then the first is the target, or with `choice: seeded` one that `seed` and the
parses themselves decide (Donut draws one anew each time; here a sample stays the same from run to
run, and wherever its row stands). The target is written as tags, see `raytune_vlm.json_tokens`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import CordSource
from raytune_vlm.errors import did_you_mean
from raytune_vlm.json_tokens import json2token
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, RowError, Shard, question
from raytune_vlm.sources.rows import Row, list_table_shards, read_table


def read_shard(
    config: CordSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The documents of a shard."""
    columns = (config.image_column, config.ground_truth_column)
    return read_table(config, shard, limits, columns, partial(_convert, config))


def _convert(config: CordSource, row: Row) -> Sample:
    parse = _parse_of(row.column(config.ground_truth_column), config)
    row.column(config.image_column)
    answer = json2token(parse, sort_keys=config.sort_keys)
    return row.sample(question(config.instruction, answer), row.images(config.image_column))


def _parse_of(truth: Any, config: CordSource) -> Any:
    """The parse that is the target; raises RowError where there is none."""
    column = config.ground_truth_column
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except json.JSONDecodeError as error:
            where = f"at line {error.lineno} column {error.colno}"
            raise RowError(f"{column}: malformed JSON: {error.msg} {where}") from error
    if not isinstance(truth, dict):
        raise RowError(f"{column} must be an object, not {type(truth).__name__}")
    parse = truth.get("gt_parse")
    if parse is None:
        parses = truth.get("gt_parses")
        parse = _chosen(parses, config) if isinstance(parses, list) and parses else None
    if parse is None:
        raise RowError(f"{column} has no gt_parse or gt_parses{did_you_mean('gt_parse', truth)}")
    if not isinstance(parse, dict | list) or not parse:
        raise RowError(f"{column}: the parse must be a non-empty object")
    return parse


def _chosen(parses: list[Any], config: CordSource) -> Any:
    if config.choice == "first":
        return parses[0]
    content = json.dumps([config.seed, parses], ensure_ascii=True, sort_keys=True).encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    return parses[number % len(parses)]


READER = Reader(list_table_shards, read_shard)
