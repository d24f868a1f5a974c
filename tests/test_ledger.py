"""Ledger and lease: nothing lost, damage named, one driver at a time."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from raytune_vlm.errors import CheckpointError, LeaseError, StorageFull
from raytune_vlm.records import SweepFolder
from raytune_vlm.sweep import lease
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import Ledger, events, replay
from raytune_vlm.sweep.storage import storage_failure


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


def test_no_bit_of_a_ledger_can_turn_over_unseen(written):
    whole, content = events(written), written.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    mark = content.index(b', "crc": ')  # without it the first line is one of an older version
    chance = random.Random(1)
    for place in {*chance.sample(range(len(content)), 200)} - {*range(mark, mark + 9)}:
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        written.write_bytes(flipped)
        if place >= last - 1:  # or the end of the line before: as if it had never been written
            assert events(written) in (whole[:-1], whole[:-2])
        else:
            with pytest.raises(CheckpointError, match=r"the ledger is damaged in this line"):
                events(written)


def test_lines_without_a_checksum_are_those_of_an_older_version(written):
    rows = [{**row, "time": 0.0} for row in events(written)]
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Ledger(written).append("resumed")
    assert events(written)[:-1] == rows and "crc" in written.read_text().splitlines()[-1]
    with written.open("a") as stream:
        stream.write(json.dumps({"seq": 7, "time": 0.0, "event": "resumed"}) + "\n")
    assert len(events(written)) == 6


def test_a_disk_that_is_full_leaves_no_half_line(written):
    ledger, before = Ledger(written), written.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            ledger.append("finished", trial_id="t0001", step=20, message="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert written.read_bytes() == before
    ledger.append("finished", trial_id="t0001", step=20, message=None)
    assert replay(written)["t0001"].ended == "finished"


def test_who_was_stopped_while_another_went_on_writes_nothing(written):
    stopped = Ledger(written)
    Ledger(written).append("resumed")
    before = written.read_bytes()
    with pytest.raises(LeaseError, match="another process has written to it"):
        stopped.append("finished", trial_id="t0001", step=20, message=None)
    assert written.read_bytes() == before


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


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_lease_of_another_host_is_watched_where_clocks_differ(tmp_path, monkeypatch, hours):
    monkeypatch.setattr(lease, "WATCH_S", 1.0)
    file = tmp_path / "lease.json"
    held = {"host": "elsewhere", "pid": 1, "fence": 3, "renewed": time.time() + 3600 * hours}

    def renew():
        file.write_text(json.dumps({**held, "renewed": held["renewed"] + 10}))

    file.write_text(json.dumps(held))
    renewing = threading.Timer(0.1, renew)
    renewing.start()
    with pytest.raises(LeaseError, match="driven by process 1 on elsewhere"), Lease(file):
        pass
    renewing.join()
    with Lease(file):  # nobody renews it any more
        assert json.loads(file.read_text())["fence"] == 4


def test_what_the_storage_is_to_blame_for(tmp_path):
    folder = SweepFolder(tmp_path)
    Ledger(folder.ledger_file)  # all that there is where benchmarks alone are scored
    full = OSError(errno.ENOSPC, "No space left on device", "ledger.jsonl")
    wrapped = RuntimeError("of Ray Tune")
    wrapped.__cause__ = full
    locked = sqlite3.OperationalError("database or disk is full")
    for error in (full, wrapped, locked, StorageFull("2 MB are free")):
        assert storage_failure(error, folder) == str(error)
    assert storage_failure(FileNotFoundError(errno.ENOENT, "no such file"), folder) is None
    folder.ledger_file.unlink()
    assert "is not there any more" in storage_failure(ValueError("no step"), folder)
