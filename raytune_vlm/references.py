"""What evaluation compares an answer with: one text, or several answers with what belongs to them.

A reference travels as text, in `Prediction.reference` and in the `reference` column of
`predictions.parquet`. It is the text of the last assistant turn. Plain text is one answer. Where a
metric needs more (ten annotators, choices), the text is a JSON object of these keys and no others:

    {"answers": ["B"], "choices": ["a cat", "a dog"], "type": "multi_choice",
     "category": "Biology", "precision": 1}

`answers` is required: a list of at least one text or number. The other keys may be left out; which
metric reads which is in `docs/metrics.md`. Any other JSON is plain text, so a document that a
model shall write as JSON stays one answer. Only a document whose keys are all from this list, with
a list of plain values under `answers`, cannot be written plainly: it has to be an entry of
`answers` itself, which `Reference.to_text` sees to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Reference:
    """The right answers to one sample, and what else its metrics need."""

    answers: tuple[str, ...]
    """At least one. Most metrics take the one that suits the prediction best."""
    choices: tuple[str, ...] = ()
    """The texts of the choices A, B, C, ..., in their order."""
    type: str = ""
    """The kind of answer: see the metrics that read it."""
    category: str = ""
    """What scores are broken down by: a subject, a task."""
    precision: int | None = None
    """Decimals that an answer of type `float` is rounded to."""
    id: str = ""
    """The authority's name of the question, for files that its server takes."""

    def to_text(self) -> str:
        """The text that `read_reference` reads as this reference."""
        plain = Reference(self.answers[:1])
        if self == plain and read_reference(self.answers[0]) == self:
            return self.answers[0]
        values = {name: getattr(self, name) for name in _KEYS}
        given = {name: value for name, value in values.items() if value not in ((), "", None)}
        return json.dumps(given, ensure_ascii=False)


_KEYS = tuple(field.name for field in fields(Reference))
_TEXTS = (str, int, float, bool)


def read_reference(text: str) -> Reference:
    """The reference that a text stands for; never raises."""
    if text.lstrip().startswith("{") and '"answers"' in text:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if _is_reference(value):
            return Reference(
                answers=tuple(map(_plain, value["answers"])),
                choices=tuple(map(_plain, value.get("choices") or ())),
                type=value.get("type") or "",
                category=value.get("category") or "",
                precision=value.get("precision"),
                id=value.get("id") or "",
            )
    return Reference((text,))


def join_references(texts: Sequence[str]) -> Reference:
    """One reference of all answers of several; the rest from the first that has it."""
    found = [read_reference(text) for text in texts]
    if len(found) == 1:
        return found[0]
    answers = tuple(answer for reference in found for answer in reference.answers)
    rest: dict[str, Any] = {
        name: next((value for entry in found if (value := getattr(entry, name))), None)
        for name in _KEYS[1:]
    }
    return Reference(answers, **{name: value for name, value in rest.items() if value})


def _is_reference(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= set(_KEYS):
        return False
    lists = [value["answers"], value.get("choices") or []]
    precision = value.get("precision")
    return (
        all(isinstance(x, list) and all(isinstance(y, _TEXTS) for y in x) for x in lists)
        and bool(value["answers"])
        and all(isinstance(value.get(name) or "", str) for name in ("type", "category", "id"))
        and (precision is None or (type(precision) is int and 0 <= precision <= 20))
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
