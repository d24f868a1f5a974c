"""How far labellers agree, field by field: teachers, samplings of one teacher, two folders."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rapidfuzz.distance import Levenshtein

from raytune_vlm.errors import DataError
from raytune_vlm.evaluate.statistics.intervals import estimate
from raytune_vlm.label.folder import Result
from raytune_vlm.records import MetricEstimate

CONFIDENCE, NUM_BOOTSTRAP, SEED = 0.95, 1000, 0
SHORT = 40
"""Characters up to which texts agree or not; longer ones agree more or less."""

Path = tuple[str | int, ...]
"""Keys and places that lead to a value; empty for the value itself."""


@dataclass(frozen=True)
class Compared:
    """The answers of all labellers to one task about one page."""

    result: Result
    """One of them: what the page is."""
    values: dict[str, Any]
    """Labeller -> answer."""
    scores: dict[Path, float]
    """Path -> agreement in 0 to 1, the mean over pairs of labellers."""
    proposed: str
    """The labeller that agrees most with the others."""

    def low(self, threshold: float) -> list[Path]:
        """The paths that the labellers do not agree on."""
        return [path for path, score in self.scores.items() if score < threshold]

    def is_agreed(self, threshold: float) -> bool:
        """Whether there are several answers, and they agree everywhere."""
        return len(self.values) > 1 and not self.low(threshold)


@dataclass(frozen=True)
class FieldAgreement:
    """One field of one task over all pages."""

    task: str
    field: str
    """Dotted; `items[].price` stands for all entries of a list."""
    agreement: MetricEstimate
    """The mean over pages, with its interval (clustered by group)."""
    num_pages: int
    num_low: int
    """Pages with an agreement below the threshold."""
    alpha: float | None
    """Krippendorff's alpha (nominal): 1 is agreement, 0 what chance gives. None for long texts,
    and where every answer is the same."""


def compare(answers: dict[str, list[Result]]) -> list[Compared]:
    """The answers of labellers (name -> results), page by page and task by task, in order.

    Raises
    ------
    DataError
        If there is but one labeller, or no page has answers of two.
    """
    grouped: dict[tuple[str, str], dict[str, Result]] = {}
    for labeller, results in answers.items():
        for result in results:
            grouped.setdefault((result.page, result.task), {})[labeller] = result
    found = [_compared(results) for results in grouped.values()]
    if not any(len(entry.values) > 1 for entry in found):
        raise DataError(
            "there is nothing to compare: no page has two answers to a task; label with two "
            "teachers or samples: 2, or name a second folder"
        )
    return found


def summary(compared: Sequence[Compared], threshold: float) -> list[FieldAgreement]:
    """Every field of every task, over the pages that have several answers."""
    fields: dict[tuple[str, str], list[tuple[Compared, list[Path]]]] = {}
    for entry in compared:
        if len(entry.values) < 2:
            continue
        own: dict[str, list[Path]] = {}
        for path in entry.scores:
            own.setdefault(field_of(path), []).append(path)
        for name, paths in own.items():
            fields.setdefault((entry.result.task, name), []).append((entry, paths))
    return [_field(task, name, pages, threshold) for (task, name), pages in fields.items()]


def copies(answers: dict[str, list[Result]]) -> list[str]:
    """The labellers that answer everything exactly as one before them, which is no second opinion.

    A teacher asked twice without sampling does, whatever the temperature that it was sent.
    """
    found, known = [], list[dict[tuple[str, str], Any]]()
    for labeller, results in answers.items():
        values = {(result.page, result.task): result.value for result in results}
        if values in known:
            found.append(labeller)
        known.append(values)
    return found


def field_of(path: Path) -> str:
    """The name of a field: entries of lists count as one."""
    name = ""
    for step in path:
        name += "[]" if isinstance(step, int) else f".{step}" if name else str(step)
    return name


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that holds no others, with its path; None for what is empty."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, (*path, key))
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from leaves(entry, (*path, place))
    else:
        yield path, None if value == "" else value


def similarity(first: Any, second: Any) -> float:
    """1 where two values are the same after normalisation, else 0; of long texts the share kept.

    Texts are compared without regard to case, blanks and Unicode's compatibility forms; numbers by
    value. Where one has more than `SHORT` characters: 1 less the Levenshtein distance over the
    length of the longer one. None stands for a value that is not there.
    """
    own, other = normal(first), normal(second)
    if own == other:
        return 1.0
    if isinstance(own, str) and isinstance(other, str) and max(len(own), len(other)) > SHORT:
        return float(Levenshtein.normalized_similarity(own, other))
    return 0.0


def normal(value: Any) -> Any:
    """A value in the form in which it is compared; True is not 1."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    return ("bool", value) if isinstance(value, bool) else value


def _compared(results: dict[str, Result]) -> Compared:
    values = {labeller: result.value for labeller, result in results.items()}
    flat = {labeller: dict(leaves(value)) for labeller, value in values.items()}
    paths = dict.fromkeys(path for own in flat.values() for path in own)
    scores: dict[Path, float] = {}
    liking = dict.fromkeys(values, 0.0)
    for path in paths:
        pairs = {
            pair: similarity(flat[pair[0]].get(path), flat[pair[1]].get(path))
            for pair in combinations(values, 2)
        }
        scores[path] = sum(pairs.values()) / len(pairs) if pairs else 0.0
        for pair, score in pairs.items():
            for labeller in pair:
                liking[labeller] += score
    proposed = max(liking, key=lambda labeller: liking[labeller])  # the first of equals
    return Compared(results[proposed], values, scores, proposed)


def _field(
    task: str, name: str, pages: list[tuple[Compared, list[Path]]], threshold: float
) -> FieldAgreement:
    values = [sum(entry.scores[path] for path in paths) / len(paths) for entry, paths in pages]
    return FieldAgreement(
        task=task,
        field=name,
        agreement=estimate(
            values,
            [1.0] * len(values),
            [entry.result.group_id for entry, _ in pages],
            confidence=CONFIDENCE,
            num_bootstrap=NUM_BOOTSTRAP,
            seed=SEED,
        ),
        num_pages=len(pages),
        num_low=sum(any(e.scores[path] < threshold for path in paths) for e, paths in pages),
        alpha=_alpha(
            [
                [_at(value, path) for value in e.values.values()]
                for e, paths in pages
                for path in paths
            ]
        ),
    )


def _at(value: Any, path: Path) -> Any:
    """The value at a path; None where there is none."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return None if value == "" else value


def _alpha(units: list[list[Any]]) -> float | None:
    """Krippendorff's alpha with the nominal distance; an absent value is a value of its own.

    `1 - Do / De` with the coincidences of pairs within units, weighted by 1 / (m - 1), and of all
    pairs (Krippendorff, Content Analysis, 2004, chapter 11).
    """
    coded = [[json.dumps(normal(value), default=str) for value in unit] for unit in units]
    if any(len(value) > SHORT + 2 for unit in coded for value in unit):
        return None
    counts = Counter(value for unit in coded for value in unit)
    total = counts.total()
    expected = 1 - sum(n * (n - 1) for n in counts.values()) / (total * (total - 1))
    if expected == 0:
        return None
    apart = 0.0
    for unit in coded:
        own = Counter(unit)
        size = len(unit)
        apart += (size * (size - 1) - sum(n * (n - 1) for n in own.values())) / (size - 1)
    return 1 - apart / total / expected
