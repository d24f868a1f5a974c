"""MMMU: `mmmu@official`, and how its 30 subjects make six domains.

Yue et al. 2024, "MMMU"; MMMU-Benchmark/MMMU, `mmmu/utils/eval_utils.py` and
`mmmu/utils/data_utils.py`.
"""

import re

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.evaluate.metrics.letters import mmmu_letter
from raytune_vlm.references import Reference

GROUPS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""Domain -> subjects, the reference's `category`. A domain weighs each question the same."""

MAX_LENGTH = 5_000
"""Of longer sentences only the end is searched for numbers, whose search takes quadratic time."""

_MARKS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu(prediction: str, reference: Reference) -> SampleScore:
    """`mmmu@official`: with choices by letter, without them by what is said.

    With choices, a letter is searched as `letters.mmmu_letter` says. Where the official script
    then picks one at random (and so gives up to 1/2 for nothing), the prediction is wrong here.

    Without choices, candidates are taken from each line: what follows the last of the words that
    announce a result (`so`, `is`, `answer`, in the last line `=`), and every number in it; or
    the whole text where no line has such a word. A number is right if it equals an answer after
    rounding both to two decimals; a text is right if it *contains* an answer that is no number.
    """
    if reference.choices:
        letter = mmmu_letter(prediction, reference.choices)
        return SampleScore(float(letter in reference.answers))
    golds = [gold for answer in reference.answers for gold in _normalise(answer)]
    for found in _candidates(prediction):
        if isinstance(found, float):
            right = found in golds
        else:
            right = any(isinstance(gold, str) and gold in found for gold in golds)
        if right:
            return SampleScore(1.0)
    return SampleScore(0.0)


def _candidates(text: str) -> list[str | float]:
    """The normalised texts and numbers that a prediction offers as its answer."""
    lines = text.strip().strip(".").lower().split("\n")
    sayings = [
        saying
        for place, line in enumerate(lines)
        if (saying := _saying(line, is_last=place == len(lines) - 1))
    ] or ["\n".join(lines)]
    numbers = [
        number
        for saying in sayings
        for pattern in _NUMBERS
        for number in pattern.findall(saying[-MAX_LENGTH:])
    ]
    return [entry for found in [*sayings, *numbers] for entry in _normalise(found)]


def _saying(line: str, *, is_last: bool) -> str:
    """The shortest text after a mark, the first of equals; empty if there is none worth a look."""
    shortest = ""
    for mark in (*_MARKS, "=") if is_last else _MARKS:
        if mark in line:
            tail = line.rsplit(mark, 1)[1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return "" if shortest in tuple(":,.!?;'") else shortest


def _normalise(text: str) -> list[str | float]:
    """A number to two decimals, or lower case; one character gets a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
