"""The command line's side of `raytune-vlm control`: ask the driver, wait for its answer, look."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from raytune_vlm.errors import ConfigError
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep.control import Request, ending_of, limits_by_hand
from raytune_vlm.sweep.head import read_head
from raytune_vlm.sweep.lease import driver_of
from raytune_vlm.sweep.ledger import TrialState, events, replay

TAKEN_WITHIN_S = 30.0
"""How long a request lies before it is withdrawn: a driver takes it within a second while it
searches, and not at all while it prepares data or chooses the winner."""

POLL_S = 0.1


def ask(folder: SweepFolder, request: Request, *, within_s: float = TAKEN_WITHIN_S) -> str:
    """Have the driver of a sweep do something; what it answered.

    Raises
    ------
    ConfigError
        If the driver refuses, or there is none, or it does not take requests now.
    """
    read_head(folder)
    if folder.result_file.exists() or driver_of(folder.lease_file) is None:
        raise _without_driver(folder)
    file = request.write(folder.control)
    ends = time.monotonic() + within_s
    while True:
        driver, late = driver_of(folder.lease_file), time.monotonic() >= ends
        row = _answer(folder, request)
        if row is not None:
            if not row["accepted"]:
                raise ConfigError(f"refused: {row['message']}")
            return str(row["message"])
        if driver is None:
            file.unlink(missing_ok=True)
            raise _without_driver(folder)
        if late and _withdrawn(file):
            raise ConfigError(
                f"the driver did not take the request within {within_s:.0f} s, so it was "
                "withdrawn: requests are taken while trials are trained, not while data is "
                "prepared or the winner is chosen"
            )
        time.sleep(POLL_S)


def _withdrawn(file: Path) -> bool:
    """Take a request back; False if the driver has taken it."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _without_driver(folder: SweepFolder) -> ConfigError:
    if folder.result_file.exists():
        return ConfigError(f"{folder.root} has ended: its winner is chosen")
    return ConfigError(
        f"no driver is at work in {folder.root}; `raytune-vlm resume {folder.root}` continues "
        "the sweep, then ask again"
    )


def _answer(folder: SweepFolder, request: Request) -> dict[str, Any] | None:
    rows = read_json_lines(folder.ledger_file)
    return next((row for row in rows if row.get("request") == request.request_id), None)


def trial_lines(folder: SweepFolder) -> list[str]:
    """What was changed by hand, and a line a trial on what it does now, from the ledger."""
    rows, is_driven = events(folder.ledger_file), driver_of(folder.lease_file) is not None
    lines = []
    endings = [kind for row in rows if (kind := ending_of(row)) is not None]
    if endings:
        lines.append(f"no new trials ({endings[-1]})")
    if limits := limits_by_hand(rows):
        changed = ", ".join(f"sweep.{key}={value}" for key, value in limits.items())
        lines.append(f"changed by hand: {changed}")
    last = {row["trial_id"]: row["event"] for row in rows if row.get("trial_id") is not None}
    for trial_id, state in replay(folder.ledger_file).items():
        words = _words(state, last.get(trial_id), is_driven)
        lines.append(f"{trial_id}  {', '.join(words)}")
    return lines


def _words(state: TrialState, last_event: str | None, is_driven: bool) -> list[str]:
    """What there is to say of a trial."""
    step = max(state.scored, default=(state.origin or {}).get("step", 0))
    if state.ended is not None:
        words = [f"{state.ended} at step {step}", *([state.message] if state.message else [])]
    elif state.held:
        words = ["paused by hand"]
    elif last_event == "paused" or (state.origin and state.promoted_to == state.origin["step"]):
        words = [f"waits at step {step}"]
    else:
        now = "running" if is_driven else "interrupted"
        words = [now + (f" past step {step}" if step else "")]
    if state.pinned and state.ended is None:
        words.append("pinned")
    if state.stop_asked and state.ended is None:
        words.append("is being stopped by hand")
    if state.origin is not None:
        words.append(f"clone of {state.origin['parent']} at step {state.origin['step']}")
    return words
