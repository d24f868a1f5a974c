"""What a sweep folder says of its sweep, and the stop of a driver on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

from raytune_vlm.errors import ConfigError, InfrastructureError
from raytune_vlm.monitor import Say
from raytune_vlm.records import SweepFolder
from raytune_vlm.report.loading import lookup
from raytune_vlm.sweep.asking import trial_lines
from raytune_vlm.sweep.head import read_head
from raytune_vlm.sweep.lease import EXPIRES_AFTER_S, driver_of
from raytune_vlm.sweep.ledger import events

POLL_S = 0.2

STOP_MARGIN_S = 120
"""How long a driver may take to end after `train.grace_s`, before a stop gives up waiting."""


def is_sweep_folder(target: str) -> bool:
    """Whether this is a sweep folder on this machine."""
    return SweepFolder(target).experiment_file.exists()


def _recorded(root: Path, key: str) -> Any:
    """A key of the experiment of a sweep folder, which may be of another version.

    Raises
    ------
    ConfigError
        If it is not there.
    """
    folder = SweepFolder(root)
    value = lookup(read_head(folder)["experiment"], key)
    if value is None:
        raise ConfigError(f"{folder.experiment_file}: {key}: is missing: not written by us")
    return value


def grace_s(root: Path) -> float:
    """`train.grace_s` of a sweep folder."""
    return float(_recorded(root, "train.grace_s"))


def status_lines(root: Path) -> list[str]:
    """Who drives the sweep, how many trials have ended how, the result if there is one, and what
    every trial does."""
    folder = SweepFolder(root)
    asked = _recorded(root, "sweep.num_trials")
    driver = driver_of(folder.lease_file)
    if driver is not None:
        ago = max(0, time.time() - driver["renewed"])
        state = f"driven by process {driver['pid']} on {driver['host']}, seen {ago:.0f} s ago"
    elif (result := folder.result()) is not None:
        state = f"ended; winner {result.winner}"
    else:
        state = f"nothing drives it; `raytune-vlm resume {root}` goes on"
    rows = events(folder.ledger_file)
    counts = Counter(row["event"] for row in rows)
    ends = {"finished", "stopped", "failed", "infeasible"}
    ended = {row["trial_id"] for row in rows if row["event"] in ends}
    how = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(ends) if counts[kind])
    return [
        f"sweep {root}: {state}",
        f"trials: {len(ended)} of {asked} ended ({how or 'none yet'}), "
        f"{counts['proposed'] - len(ended)} not yet",
        *trial_lines(folder),
    ]


def log_lines(root: Path) -> list[str]:
    """The ledger, an event a line."""
    lines = []
    for row in events(SweepFolder(root).ledger_file):
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
        rest = [f"{key} {_text(row[key])}" for key in _TOLD if row.get(key) is not None]
        lines.append(" ".join([at, row.get("trial_id", "sweep"), row["event"], *rest]))
    return lines


_TOLD = ("step", "recipe", "scores", "command", "accepted", "message")
"""Fields of an event that are shown."""


def _text(value: Any) -> str:
    """The value in one line, whatever line breaks a message has."""
    if isinstance(value, dict):
        value = " ".join(
            f"{key}={entry:.4g}" if isinstance(entry, float) else f"{key}={entry}"
            for key, entry in value.items()
        )
    return " ".join(str(value).split())


def stop(root: Path, say: Say) -> None:
    """Ask the driver of a sweep folder to stop, and wait until it has.

    Raises
    ------
    ConfigError
        If nothing drives the folder, or a process on another machine does.
    InfrastructureError
        If the driver does not end.
    """
    folder = SweepFolder(root)
    driver = driver_of(folder.lease_file)
    if driver is None:
        raise ConfigError(f"{root}: nothing drives it; `raytune-vlm resume {root}` goes on")
    pid, host = int(driver["pid"]), driver["host"]
    if host != socket.gethostname():
        raise ConfigError(
            f"{root}: is driven by process {pid} on {host}, not on this machine; stop its job: "
            f"`raytune-vlm stop {root} --address http://HEAD:8265`"
        )
    silent = time.time() - driver["renewed"]
    if silent > EXPIRES_AFTER_S:
        raise ConfigError(
            f"{root}: its driver, process {pid}, gave no sign of life for {silent:.0f} s: if it is "
            f"raytune_vlm, `kill {pid}` stops it; its number may be another process's by now"
        )
    grace = grace_s(root)
    os.kill(pid, signal.SIGTERM)
    say(f"process {pid}: asked to stop; executors have {grace:g} s to save where they are")
    end = time.monotonic() + grace + STOP_MARGIN_S
    while driver_of(folder.lease_file) is not None:
        if time.monotonic() > end:
            raise InfrastructureError(
                f"process {pid} has not ended; `kill -9 {pid}` costs the steps since the last "
                "checkpoints"
            )
        time.sleep(POLL_S)
    for line in status_lines(root):
        say(line)
