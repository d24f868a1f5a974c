"""The lease: one driver a sweep folder. A second one is told who has it; a dead one's is taken."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from raytune_vlm.errors import LeaseError
from raytune_vlm.records import read_json, write_json
from raytune_vlm.sweep.beside import Beside

RENEW_EVERY_S = 10.0
EXPIRES_AFTER_S = 60.0
"""A lease of another host that was not renewed for so long is taken over."""


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
            held = read_json(self._file)
            if driver_of(self._file) is not None:
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
        self._file.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._over.wait(RENEW_EVERY_S):
            self._write()

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
        held = read_json(file)
    except FileNotFoundError:
        return None
    return held if _is_alive(held) else None


def _is_alive(held: dict[str, object]) -> bool:
    if held["host"] == socket.gethostname():
        return held["pid"] != os.getpid() and Path(f"/proc/{held['pid']}").exists()
    return time.time() - float(str(held["renewed"])) < EXPIRES_AFTER_S
