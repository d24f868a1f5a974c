"""MathVista without a judge, `mathvista@rules`, and with one, `mathvista@judge`.

Lu et al. 2024, "MathVista"; lupantech/MathVista, `evaluation/extract_answer.py` and
`evaluation/calculate_score.py`. Officially a language model extracts the answer where the short
cuts find none (`evaluate/judge.py`). `@rules` does it by rules, and what they do not find is wrong:
scores are a little below those with a good judge, and the same every time.
"""

import re
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.evaluate.metrics.letters import letters_of, plain_letter
from raytune_vlm.references import Reference

MAX_LENGTH = 20_000
"""Only the end of a longer text is searched."""

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_STATED = re.compile(r"(?:answer|result)\b[^\d\n]{0,40}?(-?\d[\d,]*(?:\.\d+)?|-?\.\d+)", re.I)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_LIST = re.compile(r"\[[^\[\]]*\]")
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")


def mathvista(prediction: str, reference: Reference) -> SampleScore:
    """`mathvista@rules`: 1 if the extracted, normalised answer equals an answer exactly.

    With `choices` the answers are texts of choices, not letters, as the data set has them. Without,
    `type` is `integer`, `float` (rounded to `precision` decimals), `list` or `text` (the default).

    Official short cuts, in this order: the text is a choice; an integer or float reads as such;
    `The answer is "...".`. Then rules of ours: with choices `choice@letter`'s search; for a number
    the last one after `answer` or `result`, else the last in the text (commas removed); for a list
    the last in brackets; a text is itself. What was found is normalised officially: a letter in
    brackets or alone is its choice, anything else the choice at the least edit distance; integers
    are cut, floats rounded, as Python prints them.
    """
    found = _extract(prediction, reference)
    given = None if found is None else _normalise(found, reference)
    return SampleScore(float(given is not None and given in _golds(reference)))


def judged(prediction: str, reference: Reference) -> SampleScore:
    """`mathvista@judge`: 1 if an extracted answer, normalised officially, equals an answer.

    `prediction` is what `short_cut` or the judge made of the model's text.
    """
    given = _normalise(prediction.strip(), reference)
    return SampleScore(float(given is not None and given in _golds(reference)))


def short_cut(text: str, reference: Reference) -> str | None:
    """The answer where no judge is needed: the text is a choice, or a number of the asked type.

    An empty text is an empty answer, as officially.
    """
    if not text or (reference.choices and text in reference.choices):
        return text
    readers: dict[str, Callable[[str], object]] = {"integer": int, "float": float}
    try:
        reader = readers.get(reference.type.lower())
        return None if reader is None else str(reader(text))
    except ValueError:
        return None


def _golds(reference: Reference) -> tuple[str, ...]:
    """The answers; those that are plain texts without white space at the ends."""
    if reference.choices or reference.type.lower() in ("integer", "float", "list"):
        return reference.answers
    return tuple(answer.strip() for answer in reference.answers)


def _extract(text: str, reference: Reference) -> str | None:
    """The answer as it stands in the text; None if there is none."""
    kind = reference.type.lower()
    if reference.choices and text in reference.choices:
        return text
    readers: dict[str, Callable[[str], object]] = {"integer": int, "float": float}
    if kind in readers:
        try:
            return str(readers[kind](text))
        except ValueError:
            pass
    text = text[-MAX_LENGTH:]
    if quoted := _QUOTED.search(text):
        return quoted[1]
    if reference.choices:
        return plain_letter(text, reference.choices)
    if kind in readers:
        numbers = _STATED.findall(text) or _NUMBER.findall(text)
        return numbers[-1].replace(",", "") if numbers else None
    if kind == "list":
        lists = _LIST.findall(text)
        return lists[-1] if lists else None
    return text.strip()


def _normalise(found: str, reference: Reference) -> str | None:
    """What is compared with the answers; None if it is not of the asked type."""
    if reference.choices:
        return _choice(found.strip(), reference)
    try:
        match reference.type.lower():
            case "integer":
                return str(int(float(found)))
            case "float":
                return str(round(float(found), reference.precision))
    except (ValueError, OverflowError):
        return None
    return found


def _choice(found: str, reference: Reference) -> str | None:
    if not found:
        return None
    if bracketed := _BRACKETED.search(found):
        found = bracketed[1].upper()
    place = letters_of(reference.choices).find(found) if len(found) == 1 else -1
    if place >= 0:
        return reference.choices[place]
    return min(reference.choices, key=lambda choice: Levenshtein.distance(found, choice))
