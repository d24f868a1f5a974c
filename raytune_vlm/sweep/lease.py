"""The lease: one driver a sweep folder. A second one is told who has it; a dead one's is taken."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from raytune_vlm.errors import LeaseError, first_line
from raytune_vlm.records import read_json, write_json
from raytune_vlm.sweep.beside import Beside

RENEW_EVERY_S = 10.0
EXPIRES_AFTER_S = 60.0
"""A lease of another host that was not renewed for so long is taken over, unless it is renewed
while it is looked at: the clock here or there may have been set."""

WATCH_S = 2.5 * RENEW_EVERY_S
"""How long it is looked at."""


class Lease(Beside):
    """Held while a driver works on a folder; a context manager.

    Raises
    ------
    LeaseError
        On entering, if another living process holds it.
    """

    def __init__(self, file: Path) -> None:
        super().__init__("lease")
        self._file = file
        self._fence = 1

    def __enter__(self) -> Lease:
        if self._file.exists():
            held = _read(self._file)
            if driver_of(self._file) is not None or self._is_renewed(held):
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["renewed"]))
                raise LeaseError(
                    f"{self._file.parent} is driven by process {held['pid']} on {held['host']} "
                    f"(last sign of life {since}); stop it first"
                )
            self._fence = held["fence"] + 1
        self._write()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        # Where the storage is away it stays: of a process that is gone it is worth nothing.
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._over.wait(RENEW_EVERY_S):
            # Who needs the storage says so; when it is back, the lease is renewed again.
            with suppress(OSError):
                self._write()

    def _is_renewed(self, held: dict[str, Any]) -> bool:
        """Whether a driver on another host gives a sign of life while this waits for one."""
        if held["host"] == socket.gethostname():
            return False
        ends = time.monotonic() + WATCH_S
        while time.monotonic() < ends:
            if self._file.exists() and _read(self._file) != held:
                return True
            time.sleep(WATCH_S / 100)
        return False

    def _write(self) -> None:
        entry = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "fence": self._fence,
            "renewed": time.time(),
        }
        write_json(self._file, entry)


def driver_of(file: Path) -> dict[str, Any] | None:
    """Host, pid, fence and time of the process that holds a lease; None if none lives."""
    try:
        held = _read(file)
    except FileNotFoundError:
        return None
    return held if _is_alive(held) else None


def _read(file: Path) -> dict[str, Any]:
    """What a lease says; raises LeaseError where no driver can have written it."""
    try:
        held = read_json(file)
        kinds: dict[str, Any] = {"host": str, "pid": int, "fence": int, "renewed": (int, float)}
        wrong = [key for key, kind in kinds.items() if not isinstance(held.get(key), kind)]
    except ValueError as error:
        wrong = [first_line(error)]
    if wrong:
        raise LeaseError(
            f"{file}: is not as a driver writes it ({wrong[0]}); if no process drives this folder, "
            "remove that file"
        )
    return held


def _is_alive(held: dict[str, object]) -> bool:
    if held["host"] == socket.gethostname():
        return held["pid"] != os.getpid() and Path(f"/proc/{held['pid']}").exists()
    return abs(time.time() - float(str(held["renewed"]))) < EXPIRES_AFTER_S
