"""Answers written as JSON: `json_valid@strict` and `field_accuracy@json`. Rules of ours."""

import json
import re
from collections.abc import Iterator
from typing import Any

from raytune_vlm.evaluate.metrics.base import SampleScore

MAX_DEPTH = 64
"""Deeper nesting counts as no JSON."""

_FENCE = re.compile(r"\s*```[a-zA-Z]*\n(.*)\n\s*```\s*", re.DOTALL)


def is_valid(prediction: str, answer: str) -> SampleScore:
    """`json_valid@strict`: 1 if the prediction is a JSON object or list (RFC 8259), else 0.

    White space around it is fine; a code fence, `NaN`, a comment, a key that stands twice or
    nesting beyond `MAX_DEPTH` is not. Whether it is right does not matter.
    """
    return SampleScore(float(_read(prediction) is not None))


def field_accuracy(prediction: str, answer: str) -> SampleScore:
    """`field_accuracy@json`: the share of the answer's fields that the prediction has right.

    A field is a path of keys and list positions and what stands at its end: a value, `{}` or `[]`.
    It is right if the same path holds the same value: texts without white space at the ends,
    numbers by value (1 is 1.0, not "1"), true and false only themselves. What else a prediction
    holds costs nothing: `anls_star@json` punishes it. Weighted by the number of fields, so the
    aggregate is over all fields of the corpus.

    A code fence around the prediction is removed first, so that `json_valid@strict` and this tell
    form and content apart. What is no JSON object or list is one field, the text itself.
    """
    gold = dict(_fields(_document(answer)))
    found = dict(_fields(_document(prediction)))
    right = sum(path in found and found[path] == value for path, value in gold.items())
    return SampleScore(right / len(gold), float(len(gold)))


def _document(text: str) -> Any:
    fenced = _FENCE.fullmatch(text)
    value = _read(fenced[1] if fenced else text)
    return text if value is None else value


def _read(text: str) -> Any:
    """The object or list, or None."""
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) and _depth(value) <= MAX_DEPTH else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


def _depth(value: Any, above: int = 0) -> int:
    """How deep a value is nested; at most one more than `MAX_DEPTH` is looked at."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if above > MAX_DEPTH:
        return above
    return max((_depth(entry, above + 1) for entry in inner), default=above)


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """(path, (kind, value)) of everything that holds nothing else."""
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _fields(entry, (*path, key))
    elif isinstance(value, list) and value:
        for place, entry in enumerate(value):
            yield from _fields(entry, (*path, place))
    else:
        text = value.strip() if isinstance(value, str) else value
        yield path, (type(value) if isinstance(value, bool) else isinstance(value, str), text)
