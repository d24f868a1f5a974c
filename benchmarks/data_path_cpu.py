"""CPU time of a process tree, those that have ended included (Linux).

    python benchmarks/data_path_cpu.py [--no-ray]

runs known cases against it and prints what it found. The rule:

- `/proc/PID/stat` of every descendant is read twenty times a second. A process counts with its own
  time and with that of the children it has waited for, which the kernel adds up for it.
- A process that has vanished was waited for by its parent, whose sum then grew, or nobody waited
  for it (Ray's raylet ignores SIGCHLD): then it counts with what was last seen of it. So what such
  a process burns after its last reading, at most a period's worth, is lost, and nothing else.
- This process adopts orphans (`PR_SET_CHILD_SUBREAPER`), so daemons do not leave the tree.

Times come in ticks of 10 ms a process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

PERIOD = 0.05
_TICK = os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36


class Reading(NamedTuple):
    """What the kernel says of one process; times in ticks."""

    started: int
    parent: int
    own: int
    waited_for: int


def read_process(pid: int) -> Reading | None:
    """The times of a process; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    user, system, children_user, children_system = (int(field) for field in fields[11:15])
    return Reading(int(fields[19]), int(fields[1]), user + system, children_user + children_system)


class TreeCpu:
    """CPU time of all descendants of this process, its own left out."""

    def __init__(self) -> None:
        self.root = os.getpid()
        self._lock = threading.Lock()
        self._strangers: set[int] = set()
        self._tree: dict[int, Reading] = {}
        # By the survivor that may have waited for them: ended processes that are still unexplained,
        # and growth that is. A sweep takes a moment, so either may be seen one reading early.
        self._missing: dict[int, int] = {}
        self._spare: dict[int, int] = {}
        self._lost = 0
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._read()
        threading.Thread(target=self._sample, daemon=True).start()

    def seconds(self) -> float:
        """The total up to now; only differences of two calls mean something."""
        with self._lock:
            self._read()
            live = sum(reading.own + reading.waited_for for reading in self._tree.values())
            live -= self._tree[self.root].own
            return (live + self._lost + sum(self._missing.values())) / _TICK

    def processes(self) -> list[int]:
        """The descendants that are there now, zombies included."""
        with self._lock:
            self._read()
            return [pid for pid in self._tree if pid != self.root]

    def wait_until_quiet(self, seconds: float = 0.5, share: float = 0.1, limit: float = 15) -> None:
        """Return when the tree has used less than `share` of a core for a while."""
        deadline = time.monotonic() + limit
        before = self.seconds()
        while time.monotonic() < deadline:
            time.sleep(seconds)
            now = self.seconds()
            if now - before < share * seconds:
                return
            before = now

    def end_all(self) -> None:
        """Kill every descendant that is left, and wait for it."""
        for _ in range(50):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.05)

    def _sample(self) -> None:
        while True:
            time.sleep(PERIOD)
            with self._lock:
                self._read()

    def _read(self) -> None:
        now = self._read_tree()
        ended: dict[int, int] = defaultdict(int)
        for pid, last in self._tree.items():
            if pid not in now or now[pid].started != last.started:
                ended[self._survivor(pid, now)] += last.own + last.waited_for
        grown = {
            pid: reading.waited_for - self._tree[pid].waited_for
            for pid, reading in now.items()
            if pid in self._tree and reading.started == self._tree[pid].started
        }
        missing, spare = {}, {}
        for pid in {*ended, *grown, *self._missing}:
            growth, gone = grown.get(pid, 0), ended[pid]
            owed = self._missing.get(pid, 0)
            late = min(owed, growth)
            self._lost += owed - late
            growth -= late
            gone -= min(gone, self._spare.get(pid, 0))
            explained = min(gone, growth)
            missing[pid], spare[pid] = gone - explained, growth - explained
        self._missing, self._spare, self._tree = missing, spare, now

    def _survivor(self, pid: int, now: dict[int, Reading]) -> int:
        """The nearest ancestor that is still there."""
        while True:
            pid = self._tree[pid].parent if pid in self._tree else self.root
            kept = pid in self._tree and pid in now and now[pid].started == self._tree[pid].started
            if kept or pid == self.root:
                return pid

    def _read_tree(self) -> dict[int, Reading]:
        pids = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}  # noqa: PTH208
        self._strangers &= pids  # known not to be ours: they cannot become it
        readings = {}
        for pid in sorted(pids - self._strangers):
            reading = read_process(pid)
            if reading is not None:
                readings[pid] = reading
        children = defaultdict(list)
        for pid, reading in readings.items():
            children[reading.parent].append(pid)
        found, stack = {}, [self.root]
        while stack:
            pid = stack.pop()
            found[pid] = readings[pid]
            stack.extend(children[pid])
        for pid, reading in readings.items():
            if (
                pid not in found
                and reading.parent not in readings
                and reading.parent
                in (
                    0,
                    *self._strangers,
                )
            ):
                self._strangers.add(pid)
        return found


_BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"
# Starts a child that burns 2 s, waits for it or not, and ends or stays.
_PARENT = """
import signal, subprocess, sys, time
{before}
child = subprocess.Popen([sys.executable, "-c", {burn!r}], stdout=subprocess.PIPE)
{after}
child.stdout.read()  # ends when the grandchild, too, has ended
print("ready", flush=True)
sys.stdin.readline()
"""
_IGNORE = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
_RAY = """
import logging, sys, time
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
@ray.remote{options}
def burn(seconds):
    began = time.process_time()
    while time.process_time() - began < seconds: pass
ray.get([burn.remote(0.01) for _ in range(8)])
time.sleep(3)
print("ready", flush=True)
sys.stdin.readline()
ray.get([burn.remote(1.0) for _ in range(2)])
time.sleep(0.5)
print("done", flush=True)
sys.stdin.readline()
"""


def _cases() -> dict[str, tuple[str, float]]:
    two = _BURN.format(seconds=2.0)
    short = f"for _ in range(40): subprocess.run([sys.executable, '-S', '-c', {_BURN!r}])".replace(
        "{seconds}", "0.05"
    )
    return {
        "a child that ends and is waited for": (
            _PARENT.format(before="", burn=two, after="child.wait()"),
            2.0,
        ),
        "a child that ends, SIGCHLD ignored": (
            _PARENT.format(before=_IGNORE, burn=two, after=""),
            2.0,
        ),
        "a grandchild, the child waits for it": (
            _PARENT.format(
                before="",
                burn=f"import subprocess, sys; subprocess.run([sys.executable, '-c', {two!r}])",
                after="child.wait()",
            ),
            2.0,
        ),
        "a grandchild whose parent ends at once": (
            _PARENT.format(
                before="",
                burn=f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {two!r}])",
                after="child.wait()",
            ),
            2.0,
        ),
        "40 children of 0.05 s, waited for": (
            _PARENT.format(before="", burn="pass", after=short),
            2.0,
        ),
    }


def main() -> None:
    """Compare known cases with what is measured."""
    tree = TreeCpu()
    for name, (script, expected) in _cases().items():
        before = tree.seconds()
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        print(f"{name}: burns {expected:.2f} s, measured {tree.seconds() - before:.2f} s")
        process.communicate("\n")
        tree.end_all()
    if "--no-ray" in sys.argv:
        return
    for name, options in (("reused workers", ""), ("workers that end", "(max_calls=1)")):
        process = subprocess.Popen(
            [sys.executable, "-c", _RAY.format(options=options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        before = tree.seconds()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        print(f"two Ray tasks, {name}: burn 2.00 s, measured {tree.seconds() - before:.2f} s")
        process.communicate("\n")
        tree.end_all()


if __name__ == "__main__":
    main()
