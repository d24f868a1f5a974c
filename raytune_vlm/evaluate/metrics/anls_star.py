"""ANLS*: ANLS for lists and documents. `anls_star@json` and `anls_star@tags`.

Peer et al. 2024, "ANLS* - A Universal Document Processing Metric for Generative Large Language
Models" (arXiv 2402.03848); deepopinion/anls_star_metric, `src/anls_star/anls_star.py`.

Both texts are read as a document: a value is a text (numbers too, as Python prints them), nothing
(`null`), a list or an object. The score is the sum of the similarities of the values over the
number of values, counted in both documents:

- two texts: ANLS with threshold 0.5 (exactly 0.5 counts), in lower case, white space as one blank;
- lists: items are paired so that the sum of their own scores is greatest, then added up, order
  aside; an item without a partner adds to the number only (of equally great sums another than
  there may be taken: 1 of 8,000 made documents scored otherwise);
- objects: key by key; a key on one side only is compared with nothing;
- nothing against nothing, `{}`, `[]` or `""` is 1; two values of different kinds are 0, and count
  as many as the larger of them has.

Several answers are alternatives: the best counts, as do those of an inner `{"answers": [...]}` of
a JSON reference.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from raytune_vlm.evaluate.metrics.assignment import assign
from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.json_tokens import token2json
from raytune_vlm.references import Reference

THRESHOLD = 0.5
MAX_PAIRS = 100_000
"""Documents with more pairs of values than this are not compared: 1 if equal, else 0."""
MAX_DEPTH = 64
"""Documents nested deeper than this are texts."""


@dataclass(frozen=True)
class _Options:
    """Alternatives in a reference."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class _Match:
    """What a comparison adds to the sum and to the number, and the reference as it was chosen."""

    total: float
    length: int
    chosen: Any

    @property
    def score(self) -> float:
        return self.total / self.length if self.length else 1.0


def anls_star_json(prediction: str, reference: Reference) -> SampleScore:
    """`anls_star@json`: a text that is a JSON object or list is that document, others are texts."""
    gold = _Options(tuple(_with_options(_read_json(answer)) for answer in reference.answers))
    return SampleScore(_score(gold, _read_json(prediction)))


def anls_star_tags(prediction: str, reference: Reference) -> SampleScore:
    """`anls_star@tags`: documents written as tags, read by `json_tokens.token2json`."""
    gold = _Options(tuple(_read_tags(answer) for answer in reference.answers))
    return SampleScore(_score(gold, _read_tags(prediction)))


def anls_star(gold: Any, prediction: Any) -> float:
    """The score of two documents as Python values; a tuple in `gold` holds alternatives."""
    return _score(_from_tuples(gold), prediction)


def _score(gold: Any, prediction: Any) -> float:
    if _size(gold) * _size(prediction) > MAX_PAIRS:
        options = gold.values if isinstance(gold, _Options) else (gold,)
        return float(prediction in options)
    return _compare(gold, prediction).score


def _compare(gold: Any, given: Any) -> _Match:
    match gold:
        case _Options():
            found = [_compare(value, given) for value in gold.values]
            return max(found, key=lambda match: (match.score, match.chosen == given))
        case list():
            if isinstance(given, list):
                return _lists(gold, given)
        case dict():
            if isinstance(given, dict):
                return _objects(gold, given)
        case None:
            nothing = _is_nothing(given)
            return _Match(float(nothing), max(1, _length(given)), given if nothing else None)
        case _:
            if not isinstance(given, list | dict) and given is not None:
                return _Match(_similarity(gold, given), 1, gold)
    return _Match(0.0, max(_length(gold), _length(given)), gold)


def _lists(gold: list[Any], given: list[Any]) -> _Match:
    table = [[_compare(one, other) for other in given] for one in gold]
    pairs: list[tuple[int, int]] = []
    if gold and given:
        # Of equal scores the pair that is the same text goes first.
        scores = [
            [
                math.nextafter(match.score, math.inf) if match.chosen == other else match.score
                for match, other in zip(row, given, strict=True)
            ]
            for row in table
        ]
        pairs = assign(-np.array(scores))
    rows, columns = {row for row, _ in pairs}, {column for _, column in pairs}
    matches = [table[row][column] for row, column in sorted(pairs, key=lambda pair: pair[1])]
    alone = [value for row, value in enumerate(gold) if row not in rows]
    extra = [value for column, value in enumerate(given) if column not in columns]
    return _Match(
        sum(match.total for match in matches),
        sum(match.length for match in matches) + sum(map(_length, [*alone, *extra])),
        [match.chosen for match in matches] + alone,
    )


def _objects(gold: dict[str, Any], given: dict[str, Any]) -> _Match:
    total, length, chosen = 0.0, 0, {}
    for key in [*gold, *(key for key in given if key not in gold)]:
        match = _compare(gold.get(key), given.get(key))
        length += match.length
        if key not in gold and _is_nothing(given[key]):
            continue  # made up, but empty: it counts in the number only
        total += match.total
        if key in given or not _is_nothing(match.chosen):
            chosen[key] = match.chosen
    return _Match(total, length, chosen)


def _similarity(gold: object, given: object) -> float:
    first, second = (" ".join(str(value).strip().lower().split()) for value in (gold, given))
    length = max(len(first), len(second))
    similarity = 1 - (Levenshtein.distance(first, second) / length if length else 0.0)
    return similarity if similarity >= THRESHOLD else 0.0


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _length(value: Any) -> int:
    """How many values a document has; of alternatives the most."""
    match value:
        case _Options():
            return max(map(_length, value.values))
        case list():
            return sum(map(_length, value))
        case dict():
            return sum(map(_length, value.values()))
    return 1


def _size(value: Any) -> int:
    """How many values and containers a document has, over all alternatives."""
    inner: Sequence[Any] = ()
    match value:
        case _Options():
            inner = value.values
        case list():
            inner = value
        case dict():
            inner = list(value.values())
    return 1 + sum(map(_size, inner))


def _read_json(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list | dict) and _is_shallow(value) else text


def _read_tags(text: str) -> Any:
    try:
        value = token2json(text)
    except RecursionError:
        return text
    return value if _is_shallow(value) else text


def _is_shallow(value: Any, depth: int = 0) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth <= MAX_DEPTH and all(_is_shallow(entry, depth + 1) for entry in inner)


def _with_options(value: Any) -> Any:
    """The reference with every `{"answers": [...]}` in it as alternatives."""
    match value:
        case {"answers": [_, *_] as answers} if len(value) == 1:
            return _Options(tuple(map(_with_options, answers)))
        case list():
            return [_with_options(entry) for entry in value]
        case dict():
            return {key: _with_options(entry) for key, entry in value.items()}
    return value


def _from_tuples(value: Any) -> Any:
    match value:
        case tuple():
            return _Options(tuple(map(_from_tuples, value)))
        case list():
            return [_from_tuples(entry) for entry in value]
        case dict():
            return {key: _from_tuples(entry) for key, entry in value.items()}
    return value
