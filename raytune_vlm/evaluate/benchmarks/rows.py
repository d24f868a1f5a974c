"""From a benchmark's row to a question with its images and its reference: one function a layout.

Each is a row function of the source `table`: `(row, options) -> dict`, or None for a row that is no
part of the benchmark. The options are those of `config.benchmark.Benchmark.row_options`. What is
wrong with a row is raised as RowError, which quarantines it.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raytune_vlm.json_tokens import json2token
from raytune_vlm.references import Reference
from raytune_vlm.sources.base import RowError, shorten

MMMU_IMAGE = re.compile(r"<image (\d+)>")
YES_NO = ("yes", "no")

Values = Mapping[str, Any]
Options = Mapping[str, Any]


def question(row: Values, options: Options) -> dict[str, Any] | None:
    """Images first, then the prompt with the row's question and choices."""
    if not _is_kept(row, options):
        return None
    choices = _choices(row, options)
    reference = Reference(
        answers=_answers(row, options, choices),
        choices=tuple(choices),
        type=_text(row, options, "type") or "",
        category=_category(row, options),
        id=_text(row, options, "id") or "",
    )
    parts = [{"type": "image"} for _ in _images(row, options)]
    prompt = _prompt(row, options, choices)
    return _sample(row, options, [*parts, _said(prompt)], _images(row, options), reference)


def yes_no(row: Values, options: Options) -> dict[str, Any] | None:
    """As `question`; the kind of the answer is `closed` where it is yes or no, else `open`."""
    found = question(row, options)
    if found is not None:
        closed = found["reference"].answers[0].strip().lower() in YES_NO
        _refer(found, replace(found["reference"], type="closed" if closed else "open"))
    return found


def mathvista(row: Values, options: Options) -> dict[str, Any] | None:
    """As `question` with the authors' own query; the answers are texts of choices.

    `precision` goes along as a whole number.
    """
    columns = options["columns"]
    found = question(row, {**options, "columns": {**columns, "choices": None}})
    if found is not None:
        choices = tuple(str(choice) for choice in _value(row, columns["choices"]) or ())
        precision = _value(row, columns["precision"])
        decimals = None if precision is None else int(precision)
        reference = replace(found["reference"], choices=choices, precision=decimals)
        _refer(found, reference)
    return found


def mmmu(row: Values, options: Options) -> dict[str, Any] | None:
    """Interleaved images: `<image 2>` in question or choices is where column `image_2` is shown.

    Each image is shown where it is named first; named again, its name stays in the text. Those that
    the row holds and no text names come first. The category is the subject, from the row's id
    (`validation_Art_Theory_3`); choices are the text of a Python list, empty for an open question,
    which has the shorter prompt of the authors' configuration.
    """
    name = _text(row, options, "id") or ""
    subject = name.split("_", 1)[-1].rpartition("_")[0]
    if not subject:
        raise RowError(f"id '{shorten(name, 40)}' names no subject")
    choices = _python_list(_value(row, options["columns"]["choices"]))
    prompt = _prompt(row, options, choices)
    if not choices:
        asked = _text(row, options, "question") or ""
        prompt = f"{asked}\n\nAnswer the question using a single word or phrase."
    answer = _value(row, options["columns"]["answers"])
    answers = tuple(_python_list(answer)) if str(answer).startswith("[") else (str(answer),)
    reference = Reference(
        answers=answers if options["has_answers"] else ("",),
        choices=tuple(choices),
        category=subject,
        id=name,
    )
    if choices and options["has_answers"]:
        letters = string.ascii_uppercase[: len(choices)]
        if not set(answers) <= set(letters):
            raise RowError(f"answer '{shorten(answers[0], 20)}' is not one of {letters}")
    parts, images = _interleaved(prompt, row, options["columns"]["images"])
    if options["category"] not in (None, subject):
        return None
    return _sample(row, options, parts, images, reference)


def cord(row: Values, options: Options) -> dict[str, Any] | None:
    """A document and its `gt_parse` as tags."""
    column = options["columns"]["answers"]
    try:
        truth = json.loads(_value(row, column))
        parse = truth["gt_parse"]
    except (ValueError, TypeError, KeyError) as error:
        raise RowError(f"column '{column}' holds no JSON with gt_parse: {error!r}") from error
    reference = Reference((json2token(parse),))
    images = _images(row, options)
    parts = [*({"type": "image"} for _ in images), _said(options["prompt"])]
    return _sample(row, options, parts, images, reference)


def _sample(
    row: Values,
    options: Options,
    parts: list[dict[str, Any]],
    images: list[Any],
    reference: Reference,
) -> dict[str, Any] | None:
    """The row as `messages` has it; None where another category is asked for."""
    if options["category"] not in (None, reference.category):
        return None
    group = _text(row, options, "group")
    found = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": []}],
        "images": images,
        "id": _text(row, options, "id"),
        "group_id": group or None,
    }
    _refer(found, reference)
    return found


def _refer(sample: dict[str, Any], reference: Reference) -> None:
    """Put the reference into its turn."""
    sample["reference"] = reference
    sample["messages"][-1]["content"] = [_said(reference.to_text())]


def _said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _value(row: Values, column: str) -> Any:
    """The value of a column, or of a field of a struct after a dot."""
    found: Any = row
    for name in column.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise RowError(f"column '{column}' has no '{name}'")
        found = found[name]
    return found


def _text(row: Values, options: Options, role: str) -> str | None:
    """A value as text; None where there is no column for it or the value is null."""
    column = options["columns"][role]
    value = None if column is None else _value(row, column)
    return None if value is None else str(value)


def _is_kept(row: Values, options: Options) -> bool:
    return all(_value(row, column) == value for column, value in options["keep"].items())


def _category(row: Values, options: Options) -> str:
    category = _text(row, options, "category") or ""
    names = options["categories"]
    if names and category not in names:
        raise RowError(f"category '{shorten(category, 40)}' is not one of {', '.join(names)}")
    return str(names.get(category, category))


def _choices(row: Values, options: Options) -> list[str]:
    column = options["columns"]["choices"]
    value = None if column is None else _value(row, column)
    if column is not None and not (isinstance(value, list) and value):
        raise RowError(f"column '{column}' must be a list of choices, got {shorten(value, 40)}")
    return [str(choice) for choice in value or ()]


def _answers(row: Values, options: Options, choices: Sequence[str]) -> tuple[str, ...]:
    if not options["has_answers"]:
        return ("",)
    column = options["columns"]["answers"]
    value = None if column is None else _value(row, column)
    entries = value if isinstance(value, list) else [] if value is None else [value]
    texts = [str(entry["answer"]) if isinstance(entry, dict) else str(entry) for entry in entries]
    if not texts:
        raise RowError(f"column '{column}' holds no answer")
    if options["answer_is"] == "text":
        return tuple(texts)
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        raise RowError(f"answer '{shorten(texts[0], 20)}' is no number of a choice") from None
    if not all(0 <= number < len(choices) for number in numbers):
        raise RowError(f"answer {numbers[0]} is none of {len(choices)} choices, from 0")
    return tuple(string.ascii_uppercase[number] for number in numbers)


def _prompt(row: Values, options: Options, choices: Sequence[str]) -> str:
    asked = _text(row, options, "question")
    if asked is not None:
        asked = asked.strip()
        if not asked:
            raise RowError("the question is empty")
        asked = asked.capitalize() if options["capitalize"] else asked
    form = options["choice_form"]
    pairs = zip(string.ascii_uppercase, choices, strict=False)
    lines = [form.format(letter=letter, text=text) for letter, text in pairs]
    prompt: str = options["prompt"].format(question=asked, choices="\n".join(lines))
    return prompt


def _images(row: Values, options: Options) -> list[Any]:
    """The images of the row; paths with the benchmark's folder before them."""
    found = []
    for column in options["columns"]["images"]:
        value = _value(row, column)
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, str):
                image = options["image_folder"] + image
            if image is not None:
                found.append(image)
    if not found:
        raise RowError(f"column '{options['columns']['images'][0]}' is null")
    return found


def _interleaved(
    text: str, row: Values, columns: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The text as parts, images where they are named first, and the images in that order."""
    held = {number: row[column] for number, column in enumerate(columns, 1)}
    named = list(dict.fromkeys(int(number) for number in MMMU_IMAGE.findall(text)))
    for number in named:
        if held.get(number) is None:
            raise RowError(f"<image {number}> is named, but there is no such image")
    unnamed = [n for n, image in held.items() if image is not None and n not in named]
    if not named and not unnamed:
        raise RowError("the row has no image")
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in unnamed]
    shown = list(unnamed)
    start = 0
    for mark in MMMU_IMAGE.finditer(text):
        number = int(mark[1])
        if number in shown:
            continue
        if mark.start() > start:
            parts.append(_said(text[start : mark.start()]))
        parts.append({"type": "image"})
        shown.append(number)
        start = mark.end()
    if start < len(text):
        parts.append(_said(text[start:]))
    return parts, [held[number] for number in shown]


def _python_list(value: Any) -> list[str]:
    """A list of texts, or the text of a Python list of them."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(f"'{shorten(value, 40)}' is no list of choices") from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"'{shorten(value, 40)}' is no list of choices")
    return [str(entry) for entry in value]
