"""Which checkpoints stay, room for the next one, and a disk that is full in the middle of it."""

from __future__ import annotations

import math
import random
import subprocess

import numpy as np
import pytest
import torch
from made import experiment

from raytune_vlm.errors import StorageFull
from raytune_vlm.train import checkpoint
from raytune_vlm.train.retention import Retention, make_room, needed_bytes
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World


@pytest.fixture
def run(tiny_base, tiny_split):
    """A run of which nothing was saved yet."""
    config = experiment(train={"max_steps": 4, "warmup_steps": 1, "batch_size": 4})
    begun = Run(tiny_base("idefics3"), tiny_split("idefics3"), config, World(), TrainingData("d"))
    yield begun
    begun.close()


def folders(root, steps):
    for step in steps:
        (root / f"step_{step:06d}").mkdir(parents=True)
        (root / f"step_{step:06d}" / "file").write_bytes(b"x" * 1000)


def test_the_newest_and_the_best_stay_and_what_was_saved_out_of_turn_goes(tmp_path):
    folders(tmp_path, [5, 10, 15, 17, 20, 1_000_005])
    scores = {5: 0.2, 10: 0.9, 15: math.nan, 20: 0.9}
    for maximise, best in ((True, {10, 20}), (False, {5, 10})):
        assert Retention(2, 2, maximise).pinned(scores) == best
    Retention(2, 1, True).apply(tmp_path, scores, lambda step: step % 5 == 0)
    assert set(checkpoint.steps(tmp_path)) == {10, 20, 1_000_005}
    folders(tmp_path, [1_000_007])
    Retention(1, 1, True).apply(tmp_path, {}, lambda step: step % 5 == 0)
    assert set(checkpoint.steps(tmp_path)) == {1_000_005, 1_000_007}


def test_room_is_made_of_old_checkpoints_and_otherwise_it_is_told(tmp_path):
    folders(tmp_path, [1, 2, 3, 4])

    def free(folder):
        return 3_000_000 - 500_000 * len(checkpoint.steps(folder))

    make_room(tmp_path, 1000, {2}, free=lambda folder: 10**9)
    assert set(checkpoint.steps(tmp_path)) == {1, 2, 3, 4}
    make_room(tmp_path, 800_000, {2}, free=free)
    assert set(checkpoint.steps(tmp_path)) == {2, 4}
    with pytest.raises(StorageFull, match=r"needs 3\.2 MB with its margin, but 2\.0 MB are free"):
        make_room(tmp_path, 2_000_000, {2}, free=free)
    assert set(checkpoint.steps(tmp_path)) == {2, 4}


def test_the_prediction_covers_the_first_checkpoint(run, tmp_path):
    predicted = needed_bytes(run.model, tmp_path)
    run.step()
    run.save(tmp_path / "step_000001")
    measured = needed_bytes(run.model, tmp_path)
    assert measured <= predicted <= measured + 2**19


def test_a_disk_that_fills_up_keeps_what_was_there(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        run.step()
        run.save(disk / "step_000001")
        whole = needed_bytes(run.model, disk)
        (disk / "other").write_bytes(b"x" * (2**20 - whole - whole // 2))
        run.step()
        with pytest.raises(StorageFull, match="step_000002: the checkpoint could not be written"):
            run.save(disk / "step_000002")
        with pytest.raises(StorageFull, match="make room there"):
            make_room(disk, whole, set())
        assert {path.name for path in disk.iterdir()} == {"step_000001", "other"}
        checkpoint.verify(disk / "step_000001")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_python_numpy_and_torch_go_on_with_the_same_numbers(run, tmp_path):
    def draw():
        return [random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]

    run.step()
    draw()  # both normal generators hold the second of a pair now
    run.save(tmp_path / "step_000001")
    expected = [draw() for _ in range(3)]
    run.restore(tmp_path / "step_000001")
    assert [draw() for _ in range(3)] == expected
