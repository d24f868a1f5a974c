"""Ledger and lease: nothing lost, damage named, one driver at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from raytune_vlm.errors import CheckpointError, LeaseError
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import Ledger, replay


@pytest.fixture
def written(tmp_path):
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file)
    ledger.append("proposed", trial_id="t0000", number=0, recipe={"lora.rank": 4})
    ledger.append("started", trial_id="t0000")
    ledger.append("scored", trial_id="t0000", step=10, scores={"cer@micro": 0.5})
    ledger.append("proposed", trial_id="t0001", number=1, recipe={"lora.rank": 8})
    ledger.append("stopped", trial_id="t0000", step=10, message=None)
    return file


def test_replay_knows_each_trial(written):
    states = replay(written)
    assert list(states) == ["t0000", "t0001"]
    assert states["t0000"].scored == {10: {"cer@micro": 0.5}}
    assert (states["t0000"].ended, states["t0001"].ended) == ("stopped", None)
    assert states["t0001"].recipe == {"lora.rank": 8}


def test_a_torn_last_line_is_cut_off_and_numbering_goes_on(written):
    with written.open("ab") as stream:
        stream.write(b'{"seq": 6, "event": "sco')
    assert list(replay(written)) == ["t0000", "t0001"]
    ledger = Ledger(written)
    ledger.append("finished", trial_id="t0001", step=20, message=None)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert replay(written)["t0001"].ended == "finished"


@pytest.mark.parametrize("damage", ["flip", "gap"])
def test_damage_before_the_last_line_is_named_with_its_line(written, damage):
    lines = written.read_bytes().splitlines(keepends=True)
    lines[2] = b"\x00" + lines[2][1:] if damage == "flip" else b""
    written.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl:3: the ledger is damaged"):
        replay(written)


def test_an_unknown_event_is_refused(tmp_path):
    with pytest.raises(ValueError, match="event must be one of"):
        Ledger(tmp_path / "ledger.jsonl").append("exploded")


def test_a_second_driver_is_told_who_has_the_lease(tmp_path):
    file = tmp_path / "lease.json"
    code = (
        "import sys, pathlib; from raytune_vlm.sweep.lease import Lease\n"
        "with Lease(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LeaseError, match=f"driven by process {holder.pid} on "), Lease(file):
            pass
        holder.kill()
    with Lease(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        assert json.loads(file.read_text())["fence"] == 2
    assert not file.exists()
