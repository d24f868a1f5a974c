"""The ledger: append-only JSON lines, numbered and synced to disk before anything acts on them.

What a sweep knows is what its ledger says; `replay` rebuilds it, and `resume` starts from that.
Every line ends with its CRC-32. A torn last line (the writer was killed in the middle of it) is cut
off; any other damage is an error that names the line.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from raytune_vlm.errors import CheckpointError, LeaseError

EVENTS = (
    "planned",
    "proposed",
    "started",
    "noted",
    "scored",
    "paused",
    "promoted",
    "exploited",
    "stopped",
    "failed",
    "finished",
    "infeasible",
    "warm_started",
    "compared",
    "closed",
    "control",
    "resumed",
    "touched",
    "decided",
)
Ending = Literal["finished", "stopped", "failed"]

_CRC = b', "crc": '
"""What stands between a line's fields and its checksum; ledgers of earlier versions have none."""

BY_HAND = "stopped by hand"
"""The message of a trial that was."""


@dataclass
class TrialState:
    """What the ledger says of one trial."""

    trial_id: str
    number: int
    recipe: dict[str, Any]
    scored: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> metric -> value on `select`."""
    ended: Ending | None = None
    message: str | None = None
    costs: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> what the trial had cost by then (`config.objectives.COSTS`)."""
    predicted: dict[str, float] = field(default_factory=dict)
    """Costs that were predicted when the trial was proposed."""
    untrained: bool = False
    """Proposed, but predicted to break a constraint; it is no part of `num_trials`."""
    proposed_at: int = 0
    """Number of the event in the ledger; 0 if it was not read from one."""
    ended_at: int = 0
    promoted_to: int | None = None
    """The rung that the scheduler let it train to, where one promotes; None: the first."""
    origin: dict[str, Any] | None = None
    """Of a clone: `parent`, `step` and the parent's `recipe`; it is no part of `num_trials`."""
    held: bool = False
    """Paused by hand."""
    pinned: bool = False
    """Never stopped or kept waiting by the scheduler, by hand."""
    stop_asked: bool = False
    """To be stopped, by hand."""
    replaced_by: str | None = None
    """The clone that has its place in the population."""
    replicates: str | None = None
    """The trial whose recipe it has, with another seed; None: the first trial of its recipe."""

    @property
    def leaves(self) -> str | None:
        """Why it is to be stopped, if it is."""
        if self.stop_asked:
            return BY_HAND
        return f"replaced by {self.replaced_by}" if self.replaced_by else None


class Ledger:
    """Appends events; one writer at a time (the lease sees to that)."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        known, self._end = _read(file)
        self._next = len(known) + 1
        self._lock = threading.Lock()
        with file.open("ab") as stream:
            stream.truncate(self._end)

    def append(self, event: str, **fields: Any) -> int:
        """Write one event and return its number; it is on disk when this returns.

        Raises
        ------
        LeaseError
            If another process has written to the ledger since: it drives the sweep now.
        OSError
            If it cannot be written; nothing is left of it then.
        """
        if event not in EVENTS:
            raise ValueError(f"event must be one of {EVENTS}, got {event!r}")
        with self._lock:
            row = {"seq": self._next, "time": time.time(), "event": event, **fields}
            with self._file.open("r+b", buffering=0) as stream:
                if stream.seek(0, os.SEEK_END) != self._end:
                    raise LeaseError(f"{self._file}: another process has written to it; stopped")
                self._write(stream, _line(row))
            self._next += 1
            return int(row["seq"])

    def _write(self, stream: FileIO, line: bytes) -> None:
        try:
            left = memoryview(line)
            while left:
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(self._end)  # half a line before the next one would be damage
            raise
        self._end += len(line)


def replay(file: Path) -> dict[str, TrialState]:
    """Every trial of a ledger, in the order in which they were proposed.

    Raises
    ------
    CheckpointError
        If a line other than the last is damaged, an event lacks something or is of a trial that
        was never proposed, or the sequence numbers have a gap.
    """
    trials: dict[str, TrialState] = {}
    for number, row in enumerate(_read(file)[0], start=1):
        try:
            apply_event(trials, row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{file}:{number}: the ledger is damaged in this line: {error!r:.200}"
            ) from None
    return trials


def apply_event(trials: dict[str, TrialState], row: Mapping[str, Any]) -> None:
    """What an event does to the trials."""
    event, trial_id = row["event"], str(row.get("trial_id"))
    if event == "proposed":
        trial = TrialState(trial_id, row["number"], row["recipe"], proposed_at=row["seq"])
        trial.predicted = row.get("predicted", {})
        if row.get("replicates") is not None:
            trial.replicates = trials[row["replicates"]].trial_id
        trials[trial_id] = trial
    elif event == "scored":
        trials[trial_id].scored[row["step"]] = row["scores"]
        trials[trial_id].costs[row["step"]] = row.get("costs", {})
    elif event == "promoted":
        trials[trial_id].promoted_to = row["step"]
    elif event in ("finished", "stopped", "failed", "infeasible"):
        trials[trial_id].untrained = event == "infeasible"
        trials[trial_id].ended = "failed" if event == "infeasible" else event
        trials[trial_id].message = row.get("message")
        trials[trial_id].ended_at = row["seq"]
    elif event == "exploited":
        apply_exploits(trials, row)
    elif event == "control" and row["accepted"]:
        apply_control(trials, row)


def apply_exploits(trials: dict[str, TrialState], row: Mapping[str, Any]) -> None:
    """What the comparison of a population does to the trials; see `sweep/population.py`."""
    for entry in row["exploits"]:
        clone = TrialState(**entry["clone"], proposed_at=row["seq"])
        trials[clone.trial_id] = clone
        trials[entry["replaces"]].replaced_by = clone.trial_id


def apply_control(trials: dict[str, TrialState], row: Mapping[str, Any]) -> None:
    """What an accepted request does to the trials; see `sweep/control.py`."""
    command, trial_id = row["command"], row.get("trial_id")
    if command == "clone":
        clone = TrialState(**row["clone"], proposed_at=row["seq"])
        trials[clone.trial_id] = clone
    elif trial_id is not None:
        state = trials[trial_id]
        if command in ("pause", "resume"):
            state.held = command == "pause"
        elif command in ("pin", "unpin"):
            state.pinned = command == "pin"
        elif command == "stop":
            state.stop_asked = True


def events(file: Path) -> list[dict[str, Any]]:
    """Every event of a ledger, in order; damage is an error as in `replay`."""
    return _read(file)[0]


def trial_name(number: int) -> str:
    """The id of the trial of that number."""
    return f"t{number:04d}"


def num_ended(trials: dict[str, TrialState]) -> int:
    """Trials that have ended, without those that were not trained at all."""
    return sum(state.ended is not None and not state.untrained for state in [*trials.values()])


def _line(row: dict[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False).encode()
    return text[:-1] + _CRC + str(zlib.crc32(text)).encode() + b"}\n"


def _event(line: bytes, number: int, *, checked: bool) -> dict[str, Any] | None:
    """The event of that number, without its checksum; None if the line is not whole.

    `checked`: whether it must have a checksum.
    """
    text, _, rest = line.rpartition(_CRC)
    text = text + b"}" if text else line
    if text is line and (checked or not line.endswith(b"\n")):
        return None
    if text is not line and rest != str(zlib.crc32(text)).encode() + b"}\n":
        return None
    try:
        event: dict[str, Any] = json.loads(text)
        return event if event["seq"] == number else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a ledger and the number of bytes that they take."""
    if not file.exists():
        return [], 0
    found: list[dict[str, Any]] = []
    intact, checked = 0, False
    content = file.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        event = _event(line, number, checked=checked)
        checked = checked or _CRC in line
        if event is None:
            if intact + len(line) < len(content):
                raise CheckpointError(f"{file}:{number}: the ledger is damaged in this line")
            break
        found.append(event)
        intact += len(line)
    return found, intact
