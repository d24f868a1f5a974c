"""A short selection of `make faults`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_a_worker_killed_in_a_checkpoint_write_and_damaged_files_change_nothing(tmp_path):
    chosen = ("worker killed in a checkpoint write", "ledger cut off", "ledger altered", "file")
    only = [word for name in chosen for word in ("--only", name)]
    command = [sys.executable, "-m", "tests.faults", "--folder", tmp_path, *only]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "went on | same | same | same | same | 0 | 0 |" in done.stdout
