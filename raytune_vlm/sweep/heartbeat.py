"""The heartbeat of a worker: signs of life to the board, gauges set again, and a watch for hangs.

A training thread that stands still (a collective that a dead peer never joins, a file system that
does not answer) is seen by nobody else: with one worker Ray Train would wait for ever. The thread
here ends the process, after writing the stacks of all its threads; Ray Train starts it again, and
the trial goes on from its newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import IO, Any

import ray

from raytune_vlm.sweep.beside import Beside
from raytune_vlm.sweep.gauges import TrialGauges

EVERY_S = 1.0
"""Pause between two looks."""

UNTIL_MOVING = 4
"""So many times the limit until a job has beaten twice: the first step is slow."""

STUCK_S = 15.0
"""Beyond the limit, where even the watching thread cannot run: faulthandler's own thread acts."""

OTHERS_S = 2.0
"""From writing the stacks to the end of the process: other ranks write theirs."""


class Heartbeat(Beside):
    """A thread beside the training thread; a context manager.

    Parameters
    ----------
    board
        The board's actor handle.
    executor
        The executor's name.
    rank
        This worker's; only rank 0 gives signs of life.
    hang_timeout_s
        `train.hang_timeout_s`.
    sweep
        The sweep's name, for the gauges.
    """

    def __init__(
        self, board: Any, executor: str, rank: int, hang_timeout_s: float, sweep: str
    ) -> None:
        super().__init__("heartbeat")
        self.gauges = TrialGauges(sweep, executor)
        self._board, self._executor, self._rank = board, executor, rank
        self._timeout = hang_timeout_s
        self._file: Path | None = None
        self._stream: IO[str] | None = None
        self._what = ""
        self._beats, self._moved = 0, 0.0
        self._lock = threading.Lock()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.rest()

    def watch(self, folder: Path, what: str) -> None:
        """From now on `beat` is expected; stacks go to `stacks_<rank>.txt` in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._close()
            self._file = folder / f"stacks_{self._rank}.txt"
            # Open already: when something hangs it may be too late for that.
            self._stream = self._file.open("a", encoding="utf-8")
            self._what, self._beats, self._moved = what, 0, time.monotonic()

    def beat(self) -> None:
        """The training thread has come on."""
        self._beats += 1
        self._moved = time.monotonic()

    def rest(self) -> None:
        """Nothing is expected any more."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._stream is not None and self._file is not None:
            self._stream.close()
            if self._file.exists() and self._file.stat().st_size == 0:
                self._file.unlink()
        self._stream = self._file = None

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            if self._rank == 0:
                self._board.here.remote(self._executor)
            self.gauges.renew()
            with self._lock:
                if self._stream is not None:
                    self._look(self._stream)

    def _look(self, stream: IO[str]) -> None:
        limit = self._timeout * (1 if self._beats > 1 else UNTIL_MOVING)
        still = time.monotonic() - self._moved
        if still < limit:
            faulthandler.dump_traceback_later(limit - still + STUCK_S, exit=True, file=stream)
            return
        stream.write(f"{time.ctime()}: {self._what}: nothing moved for {still:.0f} s\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)
        message = (
            f"{self._executor}: {self._what}: nothing moved for {still:.0f} s on rank "
            f"{self._rank} (train.hang_timeout_s={self._timeout:g}): its worker is started "
            f"again; stacks in {self._file}"
        )
        try:
            ray.get(self._board.note.remote(message), timeout=OTHERS_S)
        finally:
            time.sleep(OTHERS_S)
            os._exit(1)
