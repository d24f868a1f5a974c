"""Plain JSON values as records, each field checked against its type.

Sweep folders are copied and edited, and those of others may say anything: what stands in a record
is what its class says, so nobody behind it has to ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def as_record(kind: type[T], value: Any) -> T:
    """The record that a JSON object stands for; raises ValueError, in one line, if it is none."""
    if not isinstance(value, Mapping):
        raise ValueError(f"it must be an object, not {type(value).__name__}")
    known = [entry.name for entry in fields(cast(Any, kind))]
    unknown = [str(name) for name in value if name not in known]
    if unknown:
        raise ValueError(f"unknown key '{unknown[0]:.40}'")
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_python(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ValueError(f"{place:.120}: {first['msg']}") from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
