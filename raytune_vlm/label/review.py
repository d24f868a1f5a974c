"""What people decide: the review list, as JSON lines and as a page, and the labels that come back.

    agreement.json   each field: agreement with its interval
    review.jsonl     what the labellers do not agree on and nobody has reviewed, the worst first
    review.html      the same with images, to choose from, to edit and to save as `reviewed.jsonl`
    reviewed.jsonl   what was decided, of all reviews; the last one of a page and task holds
    agreed.jsonl     labels that the labellers agree on or somebody reviewed

A decision is `{"page", "task", "value"}`, or `{"page", "task", "discard": true}` for no label. Rows
of `review.jsonl` that were edited by hand count once their `reviewed` is true.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import raytune_vlm
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.label import Task
from raytune_vlm.errors import DataError
from raytune_vlm.images import ImageError, thumbnail
from raytune_vlm.label.agreement import Compared, FieldAgreement, leaves, normal, summary
from raytune_vlm.label.check import misfit
from raytune_vlm.label.folder import LabelFolder, label_row, write_rows
from raytune_vlm.records import read_json_lines, write_json, write_text

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
    "base-uri 'none'; form-action 'none'"
)
MAX_SHOWN = 100
"""Entries of the page; the next ones come when these are reviewed."""
MAX_SIDE, MAX_IMAGES = 1000, 4
MAX_COMPARED = 20_000
"""Characters of a text beyond which its words are not marked."""

Decision = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What one labeller says at one path."""

    path: str
    """JSON of the keys and places."""
    value: str
    """JSON; empty where it says nothing."""
    pieces: tuple[tuple[str, bool], ...]
    """The text, cut where it differs from the proposed one."""


@dataclass(frozen=True)
class Line:
    """One path of an answer, all labellers beside each other."""

    name: str
    differs: bool
    cells: list[Cell]


@dataclass(frozen=True)
class Entry:
    """A page and task of the review page."""

    page: str
    task: str
    origin: str
    question: str
    is_text: bool
    pictures: list[str]
    """Data URIs."""
    labellers: list[str]
    lines: list[Line]
    proposed: str
    """What the label is unless somebody changes it: JSON, or the text itself."""


@dataclass(frozen=True)
class Agreed:
    """What came of a comparison."""

    fields: list[FieldAgreement]
    num_agreed: int
    num_reviewed: int
    num_discarded: int
    num_left: int
    """Neither agreed nor reviewed."""


def write_agreement(folder: LabelFolder, compared: Sequence[Compared], threshold: float) -> Agreed:
    """Write all files of a comparison but `reviewed.jsonl`, which is read."""
    config = folder.read_config()
    tasks = {task.name: task for task in config.tasks}
    decisions = {(row["page"], row["task"]): row for row in _decisions(folder)}
    fields = summary(compared, threshold)
    rows, left, counts = [], [], {"agreed": 0, "reviewed": 0, "discarded": 0}
    for entry in compared:
        result = entry.result
        decision = decisions.get((result.page, result.task))
        if decision is not None and decision.get("discard"):
            counts["discarded"] += 1
        elif decision is not None:
            counts["reviewed"] += 1
            rows.append(label_row(result, tasks[result.task], decision["value"]))
        elif entry.is_agreed(threshold):
            counts["agreed"] += 1
            rows.append(label_row(result, tasks[result.task], entry.values[entry.proposed]))
        else:
            left.append(entry)
    left.sort(key=lambda entry: min(entry.scores.values(), default=0.0))
    write_rows(folder.root / "agreed.jsonl", rows)
    write_rows(folder.root / "review.jsonl", (_review_row(entry, threshold) for entry in left))
    write_json(
        folder.root / "agreement.json",
        {"threshold": threshold, **counts, "left": len(left), "fields": [*map(asdict, fields)]},
    )
    shown = [_entry(folder, tasks, entry, config.image_limits) for entry in left[:MAX_SHOWN]]
    write_text(folder.root / "review.html", _page(folder, shown, len(left), fields, threshold))
    return Agreed(fields, counts["agreed"], counts["reviewed"], counts["discarded"], len(left))


def take_reviewed(folder: LabelFolder, file: Path, compared: Sequence[Compared]) -> int:
    """Add the decisions of a file to `reviewed.jsonl`; how many there are.

    Raises
    ------
    DataError
        If the file cannot be read, names a page that is not there, or holds a value that does not
        fit its task; nothing of it is taken then.
    """
    tasks = {task.name: task for task in folder.read_config().tasks}
    known = {(entry.result.page, entry.result.task) for entry in compared}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start})") from None
    taken = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            decision = _decision(line, f"{file}:{number}", tasks, known)
            taken += [] if decision is None else [decision]
    write_rows(folder.root / "reviewed.jsonl", [*_decisions(folder), *taken])
    return len(taken)


def _decisions(folder: LabelFolder) -> list[Decision]:
    """What was decided so far, the last one of each page and task."""
    rows = read_json_lines(folder.root / "reviewed.jsonl")
    return list({(row["page"], row["task"]): row for row in rows}.values())


def _decision(
    line: str, where: str, tasks: dict[str, Task], known: set[tuple[str, str]]
) -> Decision | None:
    try:
        row = json.loads(line)
        place = (row["page"], row["task"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: is no JSON object with page and task") from None
    if place not in known:
        raise DataError(f"{where}: this folder has no page {place[0]!r} with task {place[1]!r}")
    if row.get("reviewed") is False:
        return None
    decision = dict(zip(("page", "task"), place, strict=True))
    if row.get("discard"):
        return {**decision, "discard": True}
    if "value" not in row:
        raise DataError(f"{where}: has neither a value nor discard")
    schema = tasks[place[1]].answer_schema
    why = misfit(row["value"], schema) if schema is not None else ""
    if schema is None and not (isinstance(row["value"], str) and row["value"].strip()):
        why = "the value must be a text"
    if why:
        raise DataError(f"{where}: {why}")
    return {**decision, "value": row["value"]}


def _review_row(entry: Compared, threshold: float) -> dict[str, Any]:
    result = entry.result
    return {
        "page": result.page,
        "task": result.task,
        "origin": result.origin,
        "images": list(result.images),
        "differs": [_dotted(path) for path in entry.low(threshold)],
        "answers": entry.values,
        "value": entry.values[entry.proposed],
        "reviewed": False,
    }


def _entry(
    folder: LabelFolder, tasks: dict[str, Task], entry: Compared, limits: ImageLimits
) -> Entry:
    result = entry.result
    flat = {labeller: dict(leaves(value)) for labeller, value in entry.values.items()}
    order = [*flat[entry.proposed], *entry.scores]
    lines = []
    for path in dict.fromkeys(order):
        proposed = flat[entry.proposed].get(path)
        cells = [_cell(path, own.get(path), proposed) for own in flat.values()]
        same = len({json.dumps(normal(own.get(path)), default=str) for own in flat.values()}) == 1
        lines.append(Line(_dotted(path) or result.task, not same, cells))
    value = entry.values[entry.proposed]
    is_text = tasks[result.task].answer_schema is None
    return Entry(
        page=result.page,
        task=result.task,
        origin=result.origin,
        question=tasks[result.task].asked,
        is_text=is_text,
        pictures=[_picture(folder.root / name, limits) for name in result.images[:MAX_IMAGES]],
        labellers=list(entry.values),
        lines=lines,
        proposed=value if is_text else json.dumps(value, ensure_ascii=False, indent=2),
    )


def _cell(path: tuple[str | int, ...], value: Any, proposed: Any) -> Cell:
    shown = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    against = proposed if isinstance(proposed, str) else None
    encoded = "" if value is None else json.dumps(value)
    return Cell(json.dumps(path), encoded, tuple(_pieces(shown, against)))


def _pieces(text: str, proposed: str | None) -> list[tuple[str, bool]]:
    """The text in pieces, and whether each differs from the proposed one, word by word."""
    if proposed is None or text == proposed or max(len(text), len(proposed)) > MAX_COMPARED:
        return [(text, False)]
    own, other = (re.findall(r"\S+\s*|\s+", entry) for entry in (text, proposed))
    matcher = difflib.SequenceMatcher(None, own, other, autojunk=False)
    return [
        ("".join(own[start:end]), kind != "equal")
        for kind, start, end, _, _ in matcher.get_opcodes()
        if start < end
    ]


def _picture(file: Path, limits: ImageLimits) -> str:
    """A data URI; empty where the image is gone or damaged."""
    try:
        small = thumbnail(file.read_bytes(), limits, MAX_SIDE)
    except (OSError, ImageError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(small).decode("ascii")


def _dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(
        "."
    )


def _page(
    folder: LabelFolder,
    entries: list[Entry],
    num_left: int,
    fields: list[FieldAgreement],
    threshold: float,
) -> str:
    package = Path(raytune_vlm.__file__).parent
    environment = Environment(
        loader=FileSystemLoader(
            [package / "label" / "templates", package / "report" / "templates"]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (files("raytune_vlm.label") / "templates" / "review.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("review.html.j2").render(
        policy=POLICY.format(digest=digest),
        script=Markup(script),
        name=folder.root.resolve().name,
        entries=entries,
        num_left=num_left,
        fields=fields,
        threshold=threshold,
    )
