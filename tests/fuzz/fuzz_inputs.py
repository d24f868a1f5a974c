"""Hypothesis strategies: valid files with damage, and valid structures with odd values in them."""

from __future__ import annotations

import json
import struct
from typing import Any

from fuzz_readers import Target
from hypothesis import strategies as st

NASTY = (
    "",
    "\0",
    "\x1b]0;owned\x07\x1b[2J",
    "\u202e\u200f\ufeff",
    "a\nerror: forged",
    "\r\t\x85\u2028",
    "\udcff\ud800",
    "<image>",
    "<image>" * 9,
    "data:image/png;base64,AAAA",
    "data:,",
    "/etc/passwd",
    "../" * 9,
    "http://127.0.0.1:9/x.png",
    "hf://datasets/a/b",
    "{{ 7 * 7 }}",
    "١٢٣",
    "1e999",
    "x" * 5000,
    "'" * 99 + "/" * 99,
)
HUGE, DEEP, DEEP_OBJECT = "@huge@", "@deep@", "@deep object@"
"""Stand for what the module `json` does not write, see `as_json`."""
_NUMBERS = (0, -1, 2**31, 2**63, -(2**64), 1e308, float("nan"), float("inf"), True)
_LENGTHS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE)
_PIECES = (b"\x1b[2J", b"\0" * 16, b"\xff" * 16, b"\n", b'"', b"{", b"\xed\xa0\x80", b"\xff\xfe")


texts = st.sampled_from(NASTY) | st.text(max_size=12)
values = st.recursive(
    st.none()
    | st.sampled_from(_NUMBERS)
    | st.sampled_from((HUGE, DEEP, DEEP_OBJECT))
    | st.integers()
    | st.floats()
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged(draw: Any, files: list[bytes]) -> bytes:
    """A valid file after one to four changes of its bytes."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        share = int.from_bytes(draw(st.binary(min_size=2, max_size=2)))
        place = share * len(data) // 0xFFFF  # `integers` would prefer the beginning
        kind = draw(st.sampled_from(("flip", "byte", "cut", "splice", "length", "put", "repeat")))
        rest = data[place:]
        if kind == "flip" and rest:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and rest:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            data = data[:place] + rest[draw(st.integers(1, 64)) :] * draw(st.booleans())
        elif kind == "splice":
            other = draw(st.sampled_from(files))
            start = draw(st.integers(0, len(other)))
            data = data[:place] + other[start : start + draw(st.integers(1, 200))] + rest
        elif kind == "length":
            form = draw(st.sampled_from(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q")))
            number = struct.pack(
                form, draw(st.sampled_from(_LENGTHS)) % 256 ** struct.calcsize(form)
            )
            data[place : place + len(number)] = number
        elif kind == "put":
            data[place:place] = draw(st.sampled_from(_PIECES) | st.binary(max_size=24))
        else:
            data[place:place] = rest[: draw(st.integers(1, 64))] * draw(
                st.sampled_from((2, 9, 200))
            )
    return bytes(data)


@st.composite
def altered(draw: Any, value: Any) -> Any:
    """A JSON value with one of its parts replaced, left out, doubled or renamed."""
    inside = isinstance(value, dict | list) and value
    if not inside or draw(st.integers(0, 3)) == 0:
        return draw(values)
    if isinstance(value, dict):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(("inside", "inside", "inside", "drop", "add", "rename")))
        if kind == "add":
            return {**value, draw(texts): draw(values)}
        rest = {name: entry for name, entry in value.items() if name != key}
        if kind == "drop":
            return rest
        if kind == "rename":
            return {**rest, draw(texts): value[key]}
        return {**value, key: draw(altered(value[key]))}
    place = draw(st.integers(0, len(value) - 1))
    kind = draw(st.sampled_from(("inside", "inside", "inside", "drop", "double")))
    if kind == "double":
        return [*value, *value[place:]]
    middle = [draw(altered(value[place]))] if kind == "inside" else []
    return [*value[:place], *middle, *value[place + 1 :]]


def as_json(value: Any) -> bytes:
    """JSON, also of a number of 5,000 digits and of lists and objects in each other 20,000 deep."""
    text = json.dumps(value)
    text = text.replace(f'"{HUGE}"', "9" * 5000)
    text = text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000)
    return text.replace(f'"{DEEP_OBJECT}"', '{"a":' * 20_000 + "1" + "}" * 20_000).encode()


@st.composite
def structured(draw: Any, target: Target) -> bytes:
    """A valid file of JSON, JSON lines or text with odd values in the place of its own."""
    file = draw(st.sampled_from(target.valid()))
    if target.kind == "jsonl":
        rows = [json.loads(line) for line in file.splitlines()]
        place = draw(st.integers(0, len(rows) - 1))
        rows[place] = draw(altered(rows[place]))
        return b"".join(as_json(row) + b"\n" for row in rows)
    if target.kind == "json":
        found = as_json(draw(altered(json.loads(file))))
        if draw(st.integers(0, 9)) == 0:  # a key that comes twice
            found = found.replace(b"{", b'{"answers": 1, "file_name": 1, "messages": 1,', 1)
        return found
    text = file.decode()
    words = sorted({*text.replace("\n", " ").replace(",", " ").split()})
    odd = draw(texts | st.sampled_from(ODD_YAML) | values.map(lambda v: as_json(v).decode()))
    text = text.replace(draw(st.sampled_from(words)), odd, draw(st.integers(1, 3)))
    return text.encode("utf-8", "surrogatepass")


ODD_YAML = (
    "&a [*a, *a]",
    "*a",
    "!!int x",
    "!!bool maybe",
    "!!float '-'",
    "!!binary '*'",
    "!!python/object/apply:os.system [id]",
    "!!timestamp x",
    "<<: {a: b}",
    ".nan",
    "-.inf",
    "1_0",
    "0x1F",
    '"\\uD800"',
    '"\\0\\e[2J"',
    '"a\\nerror: forged"',
    "? [a]\n: b",
    "{a: 1, a: 2}",
    "%YAML 9.9",
    "---",
    "\t",
    "9" * 5000,
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000,
)


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """What a reader is tried with."""
    if target.kind == "binary":
        return damaged(target.valid())
    return structured(target) | damaged(target.valid())
