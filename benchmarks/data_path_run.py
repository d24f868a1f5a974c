"""Runs one contestant of `data_path.py` in this process, which that program starts and measures.

    python benchmarks/data_path_run.py NAME TASK.json

It says READY when everything is warm, goes on when it is told to, prints one JSON line, and stays
until it is told to end: meanwhile the CPU time of the processes that it started can be read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Consume = Callable[[Path], dict[str, Any]]
"""Reads the Parquet files of a folder once."""


@dataclass(frozen=True)
class Task:
    """What a contestant is given."""

    parts: Path
    """Folder of the Parquet files that are measured."""
    warm_up: Path
    """Folder of the Parquet files that are read before."""
    model: Path
    scratch: Path
    """Where a contestant may write; kept from run to run."""
    num_images: int
    num_cpus: int = 2

    def save(self, file: Path) -> None:
        """Write it for `load`."""
        file.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, file: Path) -> Task:
        """What `save` has written."""
        values = json.loads(file.read_text())
        paths = {name: Path(values.pop(name)) for name in ("parts", "warm_up", "model", "scratch")}
        return cls(**paths, **values)


def main(name: str, task_file: Path) -> None:
    """The protocol between a contestant and the program that measures it."""
    # Libraries and workers print too: what goes to stdout by itself is sent to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from data_path_contestants import CONTESTANTS

    task = Task.load(task_file)
    consume = CONTESTANTS[name](task)
    consume(task.warm_up)
    print("READY", file=channel)
    sys.stdin.readline()
    began = time.perf_counter()
    result = consume(task.parts)
    wall = time.perf_counter() - began
    print(json.dumps({"name": name, "wall_s": wall, **result}), file=channel)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
