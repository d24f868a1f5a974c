"""Numbers, durations and recipe values as people read them; the filters of the templates."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"  # noqa: RUF001  (an en dash is what a table shows for nothing)
SPACE = "\u00a0"
"""A space that does not break between a number and its unit."""


def score(value: float | None) -> str:
    """A metric with three decimals: `0.873`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.3f}".replace("-", "\u2212")


def signed(value: float) -> str:
    """A difference with its sign: `+0.241`."""
    return f"{value:+.3f}".replace("-", "\u2212")


def count(value: float | None) -> str:
    """A whole number in groups of three: `12,345`."""
    return MISSING if value is None else f"{round(value):,}"


def compact(value: float) -> str:
    """A large number in three digits: `4.19 M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{SPACE}{unit}"
    return f"{value:g}"


def percent(value: float | None) -> str:
    """A share: `2.5 %`."""
    return MISSING if value is None else f"{100 * value:.3g}{SPACE}%"


def duration(seconds: float) -> str:
    """A time in its two largest units: `2 h 05 min`."""
    if seconds < 1:
        return f"{1000 * seconds:.0f}{SPACE}ms" if seconds > 0 else f"0{SPACE}s"
    if seconds < 60:
        return f"{seconds:.3g}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{rest:02d}{SPACE}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{SPACE}h{SPACE}{minutes:02d}{SPACE}min"


def p_value(value: float) -> str:
    """`p < 0.001` or `p = 0.021`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def recipe_value(value: Any) -> str:
    """A value of a recipe, floats with three digits: `3.2e-4`, `0.05`, `text+vision`."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value and (abs(value) < 1e-2 or abs(value) >= 1e5):
            mantissa, exponent = f"{value:.2e}".split("e")
            short = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
            return f"{short}e{int(exponent)}"
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def plain(value: Any) -> str:
    """Any JSON value in one short line: dicts as `key value, key value`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(plain(entry) for entry in value)
    return recipe_value(value)


FILTERS = {
    "score": score,
    "signed": signed,
    "count": count,
    "compact": compact,
    "percent": percent,
    "duration": duration,
    "p_value": p_value,
    "recipe_value": recipe_value,
    "plain": plain,
}
