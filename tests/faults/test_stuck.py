"""A worker whose training thread never lets go of the interpreter's lock ends all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
from made import cli_environment

pytestmark = pytest.mark.slow

STUCK = """
import ctypes, sys
from pathlib import Path
from raytune_vlm.sweep import heartbeat

class Board:
    # Rank 1 gives no signs of life, and nothing can be noted by who holds the lock.
    here = note = None

heartbeat.STUCK_S = 1.0
with heartbeat.Heartbeat(Board(), "executor-0", 1, 1.5, "test") as beat:
    beat.watch(Path(sys.argv[1]), "t0000")
    beat.beat()
    beat.beat()
    heartbeat.time.sleep(1.2)  # the watching thread has looked once
    beat.beat()
    ctypes.PyDLL(None).sleep(600)  # a C function that is called with the lock held
"""


def test_the_process_ends_and_its_stacks_are_there(tmp_path):
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    done = subprocess.run(command, env=cli_environment(), timeout=120, check=False)
    assert done.returncode == 1
    stacks = (tmp_path / "stacks_1.txt").read_text()
    assert "Timeout" in stacks and "in <module>" in stacks
