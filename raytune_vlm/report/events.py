"""The events of a ledger for people who look at it, each value of the kind that is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    "exploits": list,
}
DONE_BY_HAND = {
    "stop": "stopped",
    "pause": "paused",
    "resume": "resumed",
    "pin": "pinned",
    "unpin": "unpinned",
}
"""Command of `raytune-vlm control` -> what it did to a trial."""

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
        if not wrong and row.get("event") == "exploited":
            wrong = "" if _is_comparison(row) else "exploits"
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
        and isinstance(origin.get("recipe"), dict)
    )


def _is_comparison(row: dict[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("replaces"), str)
        and isinstance(entry.get("clone"), dict)
        and _is_clone(entry["clone"])
        for entry in row.get("exploits", [None])
    )


def clone_origins(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Clone, made by a person or by a population -> its parent, the step that it goes on from and
    the parent's recipe."""
    clones = [row["clone"] for row in rows if row.get("clone")]
    clones += [entry["clone"] for _, entry in _exploits(rows)]
    return {clone["trial_id"]: clone["origin"] for clone in clones}


def lineages(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Trial -> whose clone it is, and which clone has replaced it, in words."""
    found = {
        trial_id: [f"clone of {origin['parent']} at step {origin['step']:,}"]
        for trial_id, origin in clone_origins(rows).items()
    }
    for step, entry in _exploits(rows):
        words = f"replaced by {entry['clone']['trial_id']} at step {step:,}"
        found.setdefault(entry["replaces"], []).append(words)
    return {trial_id: tuple(words) for trial_id, words in found.items()}


def _exploits(rows: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(step, who is replaced by which clone) of population based training, in order."""
    compared = [row for row in rows if row.get("event") == "exploited"]
    return [(row["step"], entry) for row in compared for entry in row["exploits"]]


def by_hand(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Trial -> what a person did to it while the sweep ran, in words, in order."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("event") != "control" or not row.get("accepted"):
            continue
        if row["command"] != "clone" and row.get("trial_id"):
            done = DONE_BY_HAND.get(row["command"], row["command"])
            found.setdefault(row["trial_id"], []).append(f"{done} by hand")
    return {trial_id: tuple(words) for trial_id, words in found.items()}
