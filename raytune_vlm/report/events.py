"""The events of a ledger for people who look at it, each value of the kind that is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from raytune_vlm.records import read_json_lines

_KINDS: dict[str, type | tuple[type, ...]] = {
    "event": str,
    "time": (int, float),
    "trial_id": str,
    "step": int,
    "message": (str, type(None)),
    "kind": (str, type(None)),
    "infeasible": (str, type(None)),
    "command": str,
    "clone": dict,
    "limits": dict,
}
_LAST = 253_402_300_799
"""Seconds as far as the year 9999."""


def read_events(file: Path) -> list[dict[str, Any]]:
    """All events; raises ValueError that names the first that says something else than it should.

    Stricter than `sweep.ledger.replay` in nothing that a sweep writes.
    """
    rows = read_json_lines(file)
    for number, row in enumerate(rows, start=1):
        wrong = next((key for key, kind in _KINDS.items() if not _is(row.get(key, ...), kind)), "")
        if not wrong and not 0 <= row.get("time", 0) <= _LAST:
            wrong = "time"
        if not wrong and row.get("event") == "infeasible":
            wrong = next((key for key in ("trial_id", "message") if key not in row), "")
        if not wrong and row.get("event") == "control":
            wrong = "" if isinstance(row.get("command"), str) else "command"
        if not wrong and row.get("infeasible") and "trial_id" not in row:
            wrong = "trial_id"
        if not wrong and row.get("clone"):
            wrong = "" if _is_clone(row["clone"]) else "clone"
        if wrong:
            raise ValueError(f"event {number}: '{wrong}' is missing or of another kind")
    return rows


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return value is ... or isinstance(value, kind)


def _is_clone(value: dict[str, Any]) -> bool:
    origin = value.get("origin")
    return (
        isinstance(value.get("trial_id"), str)
        and isinstance(origin, dict)
        and isinstance(origin.get("parent"), str)
        and isinstance(origin.get("step"), int)
    )
