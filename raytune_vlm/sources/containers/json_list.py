"""A `.json` file that holds a list of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO

from raytune_vlm.sources.base import Shard
from raytune_vlm.sources.containers.raw import Container, RawRow, as_row, whole


def read(stream: IO[bytes], shard: Shard, columns: Sequence[str]) -> Iterator[RawRow]:
    """The items of the list, which is held whole."""
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
        yield as_row(number, item)


CONTAINER = Container(read, whole)
