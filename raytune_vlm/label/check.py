"""An answer's text -> the value of a label, or why it is none."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from referencing import Registry

from raytune_vlm.inspection.text import line

MAX_TOLD = 5
"""Errors of a schema that are told at once."""
_FENCE = re.compile(r"```[A-Za-z]*\s*\n(.*?)\n?\s*```", re.DOTALL)


class Unfit(ValueError):
    """An answer that is no label; the text says why.

    `mendable`: whether the teacher may mend it when told.
    """

    def __init__(self, why: str, mendable: bool = True) -> None:
        super().__init__(why)
        self.mendable = mendable


def read_answer(text: str, truncated: bool, schema: dict[str, Any] | None) -> Any:
    """The value that an answer holds: JSON that fits the schema, or without one its text.

    JSON may stand in one fenced block, as chat models like to write it.

    Raises
    ------
    Unfit
        If it is empty or cut, no JSON, or does not fit.
    """
    if truncated:
        raise Unfit("it is cut at max_tokens", mendable=False)
    text = text.strip()
    if not text:
        raise Unfit("it is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unfit("it holds half of a surrogate pair: no valid Unicode") from None
    if schema is None:
        return text
    fenced = _FENCE.findall(text)
    value = _parsed(fenced[0] if len(fenced) == 1 else text)
    if why := misfit(value, schema):
        raise Unfit(why)
    return value


def misfit(value: Any, schema: dict[str, Any]) -> str:
    """In one line where a value does not fit a schema; empty where it does."""
    validator = Draft202012Validator(
        schema,
        registry=Registry(),  # nothing is fetched
        format_checker=Draft202012Validator.FORMAT_CHECKER,
    )
    errors = sorted(validator.iter_errors(value), key=lambda error: error.json_path)
    told = [f"{error.json_path}: {line(error.message, 160)}" for error in errors[:MAX_TOLD]]
    more = len(errors) - len(told)
    return "; ".join(told) + (f" (and {more} more)" if more > 0 else "")


def as_text(value: Any) -> str:
    """The text that a model learns to answer with."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # escaped halves of surrogate pairs
    except UnicodeEncodeError:
        raise Unfit("it holds half of a surrogate pair: no valid Unicode") from None
    except RecursionError:
        raise Unfit("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Unfit(f"it is no JSON: {error.msg} at {where}") from None
    except ValueError as error:  # a constant, or a number of thousands of digits
        raise Unfit(f"it is no JSON: {line(error, 80)}") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
