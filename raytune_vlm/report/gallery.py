"""Samples of the untouched split, side by side: the image, the truth, the base's answer, the
winner's answer.

Images are the thumbnails that `prepare` stored under `data/gallery/`; they are embedded unopened.
Answers in tagged JSON become trees whose wrong fields are marked against the truth; of other
answers the words that differ are marked.
"""

from __future__ import annotations

import base64
import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raytune_vlm.json_tokens import is_parsable, token2json
from raytune_vlm.records import BASE_TRIAL
from raytune_vlm.references import Reference, read_reference
from raytune_vlm.report.loading import SweepView
from raytune_vlm.report.predictions import predictions

Mark = Literal["", "right", "wrong", "missing", "extra"]

MAX_SAMPLES = 12
NUM_OPENING = 4
MAX_IMAGE_BYTES = 400_000
MAX_COMPARED = 4000
"""Characters of an answer beyond which its words are not compared."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Line:
    """One line of an answer's tree."""

    depth: int
    key: str
    value: str | None
    """None for a line that only opens a group."""
    mark: Mark


@dataclass(frozen=True)
class Answer:
    """What one system said: a tree where it is tagged JSON, else its text."""

    text: str
    tree: list[Line] | None
    score: float | None
    mark: Mark
    pieces: tuple[tuple[str, Mark], ...] = ()
    """The text cut where it differs from the truth, and what it lacks; empty where it has nothing
    in common with it."""


@dataclass(frozen=True)
class Exhibit:
    """One sample of the gallery."""

    sample_id: str
    prompt: str
    image: str | None
    """A data URI."""
    change: str
    """What the sample shows: `improved`, `both right`, `worse`, `unchanged`."""
    truth: Answer
    base: Answer
    winner: Answer


@dataclass(frozen=True)
class _Pair:
    base: dict[str, Any]
    winner: dict[str, Any]
    gain: float
    """How much better the winner is; positive is better in both modes."""

    @property
    def sample_id(self) -> str:
        return str(self.winner["sample_id"])


def gallery(view: SweepView) -> list[Exhibit]:
    """Up to twelve samples: the largest gains, some that got worse, some right in both.

    Only of those whose picture was kept, if any was.
    """
    if view.result is None:
        return []
    base = predictions(view, BASE_TRIAL, None)
    winner = predictions(view, view.result.winner, view.result.winner_step)
    sign = 1.0 if view.mode == "max" else -1.0
    pairs = []
    for sample_id in sorted(base.keys() & winner.keys()):
        scores = [rows[sample_id].get(view.metric) for rows in (winner, base)]
        values = [float(s) if s is not None else math.nan for s in scores]
        gain = sign * (values[0] - values[1])
        if math.isfinite(gain):
            pairs.append(_Pair(base[sample_id], winner[sample_id], gain))
    pictured = [pair for pair in pairs if _image_file(view.folder.gallery, pair.sample_id)]
    return [_exhibit(view, pair) for pair in _choose(view, pictured or pairs)]


def _choose(view: SweepView, pairs: list[_Pair]) -> list[_Pair]:
    """Six gains, three losses, three right in both; where one has too few, the rest fills up.

    The first four show every kind: they are what the page opens with.
    """
    ordered = sorted(pairs, key=lambda pair: (-pair.gain, pair.sample_id))
    gains = [pair for pair in ordered if pair.gain > 0]
    losses = [pair for pair in reversed(ordered) if pair.gain < 0]
    right = [pair for pair in ordered if pair.gain == 0 and _is_right(view, pair.winner)]
    chosen = [*gains[:6], *losses[:3], *right[:3]]
    rest = [pair for pair in ordered if pair not in chosen]
    chosen += rest[: max(0, MAX_SAMPLES - len(chosen))]
    opening = [*gains[:2], *losses[:1], *right[:1]]
    opening += [pair for pair in chosen if pair not in opening][: NUM_OPENING - len(opening)]
    return opening + [pair for pair in chosen if pair not in opening]


def _is_right(view: SweepView, row: dict[str, Any]) -> bool:
    return abs(float(row[view.metric]) - (1.0 if view.mode == "max" else 0.0)) < 1e-9


def _exhibit(view: SweepView, pair: _Pair) -> Exhibit:
    reference = read_reference(str(pair.winner.get("reference") or ""))
    change = "improved" if pair.gain > 0 else "worse" if pair.gain < 0 else "unchanged"
    if pair.gain == 0 and _is_right(view, pair.winner):
        change = "both right"
    return Exhibit(
        sample_id=pair.sample_id,
        prompt=str(pair.winner.get("prompt") or ""),
        image=_image(view.folder.gallery, pair.sample_id),
        change=change,
        truth=_truth(reference),
        base=_answer(view, pair.base, reference),
        winner=_answer(view, pair.winner, reference),
    )


def _image_file(folder: Path, sample_id: str) -> Path | None:
    """Where the thumbnail lies; None if there is none of sensible size."""
    if not _SAFE_NAME.fullmatch(sample_id):
        return None
    file = folder / f"{sample_id}.jpg"
    return file if file.is_file() and file.stat().st_size <= MAX_IMAGE_BYTES else None


def _image(folder: Path, sample_id: str) -> str | None:
    """The thumbnail as a data URI; None if there is none, or it is no JPEG."""
    file = _image_file(folder, sample_id)
    content = file.read_bytes() if file else b""
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def _truth(reference: Reference) -> Answer:
    """The answers, each once; a tree where it is one, in tags."""
    text = " | ".join(dict.fromkeys(reference.answers))
    tree = tree_of(token2json(text)) if is_parsable(text) and len(reference.answers) == 1 else None
    return Answer(text, tree, None, "")


def _answer(view: SweepView, row: dict[str, Any], reference: Reference) -> Answer:
    text = str(row.get("prediction") or "")
    score = float(row[view.metric])
    gold = reference.answers[0]
    if len(reference.answers) == 1 and is_parsable(gold) and is_parsable(text):
        return Answer(text, compare(token2json(text), token2json(gold)), score, "")
    answers = {answer.strip() for answer in reference.answers}
    if text.strip() in answers:
        return Answer(text, None, score, "right")
    return Answer(text, None, score, "wrong", differences(text, reference.answers))


def differences(text: str, truths: tuple[str, ...]) -> tuple[tuple[str, Mark], ...]:
    """The words of a text, marked against the most alike of the truths; those it lacks as missing.

    Nothing for texts without a common word, and for very long ones.
    """
    if len(text) > MAX_COMPARED or max(map(len, truths)) > MAX_COMPARED:
        return ()
    words = re.findall(r"\S+\s*", text.strip())
    right = [re.findall(r"\S+\s*", truth.strip()) for truth in truths]
    found = [difflib.SequenceMatcher(None, words, own, autojunk=False) for own in right]
    place = max(range(len(found)), key=lambda index: found[index].ratio())
    if found[place].ratio() == 0:
        return ()
    pieces: list[tuple[str, Mark]] = []
    for kind, start, end, start_truth, end_truth in found[place].get_opcodes():
        own, lacking = "".join(words[start:end]), "".join(right[place][start_truth:end_truth])
        mark: Mark = "" if kind == "equal" else "extra" if kind == "delete" else "wrong"
        if own:
            pieces.append((own, mark))
        if lacking and kind != "equal":
            pieces.append((lacking, "missing"))
    return tuple(pieces)


def tree_of(value: Any, mark: Mark = "", key: str = "", depth: int = 0) -> list[Line]:
    """A JSON value as indented lines, all with one mark."""
    if isinstance(value, dict) and value:
        below = depth + bool(key)
        head = [Line(depth, key, None, mark)] if key else []
        return head + [
            line for name, entry in value.items() for line in tree_of(entry, mark, name, below)
        ]
    if isinstance(value, list) and value:
        return [line for entry in value for line in tree_of(entry, mark, key, depth)]
    return [Line(depth, key, "" if value in ({}, [], None) else str(value), mark)]


def compare(answer: Any, truth: Any, key: str = "", depth: int = 0) -> list[Line]:
    """The answer as indented lines, each right, wrong or extra; what it lacks as missing lines.

    Lines come in the truth's order, so that columns side by side match; entries of lists are
    compared in their order.
    """
    if isinstance(answer, dict) and isinstance(truth, dict) and answer and truth:
        lines = [Line(depth, key, None, "")] if key else []
        below = depth + bool(key)
        for name in [*truth, *(name for name in answer if name not in truth)]:
            if name not in truth:
                lines += tree_of(answer[name], "extra", name, below)
            elif name not in answer:
                lines += tree_of(truth[name], "missing", name, below)
            else:
                lines += compare(answer[name], truth[name], name, below)
        return lines
    if isinstance(answer, list) or isinstance(truth, list):
        answers = answer if isinstance(answer, list) else [answer]
        truths = truth if isinstance(truth, list) else [truth]
        lines = []
        for index in range(max(len(answers), len(truths))):
            if index >= len(truths):
                lines += tree_of(answers[index], "extra", key, depth)
            elif index >= len(answers):
                lines += tree_of(truths[index], "missing", key, depth)
            else:
                lines += compare(answers[index], truths[index], key, depth)
        return lines
    return tree_of(answer, "right" if answer == truth else "wrong", key, depth)
