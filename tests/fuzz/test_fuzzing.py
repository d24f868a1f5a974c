"""Each reader with some tens of damaged and odd inputs; `make fuzz` tries thousands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_fuzz import TARGETS

EXAMPLES = 12


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """What became of each reader, all in one process that forks: its limits are not ours."""
    script = Path(__file__).with_name("run_fuzz.py")
    command = [sys.executable, "-W", "ignore", str(script), "--examples", str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(TARGETS), done.stderr
    return {outcome["reader"]: outcome for outcome in found}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_read_gives_a_result_or_one_safe_line(name, outcomes):
    outcome = outcomes[name]
    assert not outcome["failure"], outcome
    assert outcome["executions"] >= EXAMPLES
