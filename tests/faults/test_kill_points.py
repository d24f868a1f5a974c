"""Twenty kills at random moments, inside the writing of a checkpoint too: the end is the same.

Children are forked from this process, which has the model loaded already: a life costs a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback

import numpy as np
import pytest
import torch
from made import experiment

from raytune_vlm.records import read_json_lines, write_text
from raytune_vlm.train import checkpoint
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

pytestmark = pytest.mark.slow

STEPS, EVERY = 10, 2
KILLS = 20
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "state.json")


def live(base, split, folder):
    """A life: go on from the newest checkpoint to the last step."""
    train = {"max_steps": STEPS, "warmup_steps": 2, "batch_size": 4, "micro_batch_size": 2}
    config = experiment(lora={"rank": 4, "dropout": 0.1}, train=train)
    run = Run(base, split, config, World(), TrainingData("d"))
    checkpoints, log = folder / "checkpoints", folder / "metrics.jsonl"
    checkpoint.clear_leftovers(checkpoints)
    found, damaged = checkpoint.newest(checkpoints)
    if found is not None:
        run.restore(found)
    kept = [row for row in read_json_lines(log) if row["step"] <= run.steps_done]
    write_text(log, "".join(json.dumps(row) + "\n" for row in kept))
    (folder / "lives.txt").open("a").write(f"from {run.steps_done}, {damaged}\n")
    while run.steps_done < STEPS:
        metrics = run.step()
        # What a library might draw in a step: numpy's normals come in pairs, one is kept back.
        drawn = [random.random(), random.gauss(0, 1), float(np.random.normal())]
        drawn.append(float(torch.rand(())))
        row = {
            "step": metrics.step,
            "loss": metrics.loss,
            "norm": metrics.grad_norm,
            "drawn": drawn,
        }
        with log.open("a") as stream:
            stream.write(json.dumps({**row, "drawn": drawn}) + "\n")
        if metrics.step % EVERY == 0:
            run.save(checkpoints / f"step_{metrics.step:06d}")


@pytest.fixture(scope="module")
def begin(tiny_base, tiny_split):
    """Folder -> the process id of a life in it."""
    base, split = tiny_base("idefics3"), tiny_split("idefics3")

    def fork(folder):
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            live(base, split, folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    return fork


@pytest.fixture(scope="module")
def ended(begin, tmp_path_factory):
    """The folder of a run that nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    finish(begin(folder))
    return folder


def outcome(folder):
    """Bytes of the last checkpoint, and every row of the log."""
    last = folder / "checkpoints" / f"step_{STEPS:06d}"
    digests = {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in FILES}
    return digests, (folder / "metrics.jsonl").read_text()


def finish(child):
    assert os.waitpid(child, 0)[1] == 0


def wait_for(moment, end):
    while not moment():
        assert time.monotonic() < end, "that moment never came"
        time.sleep(0.002)  # the core belongs to the child


def test_a_run_killed_anywhere_ends_as_the_undisturbed_one(begin, ended, tmp_path):
    began = time.monotonic()
    finish(begin(tmp_path / "again"))
    duration = time.monotonic() - began
    expected = outcome(ended)
    assert outcome(tmp_path / "again") == expected
    chance = random.Random(20261121)
    inside, done, second = 0, [], None
    for number in range(KILLS):
        folder = tmp_path / f"kill-{number}"
        child = begin(folder)
        checkpoints, end = folder / "checkpoints", time.monotonic() + 60
        if number % 3 == 0:
            # Inside the writing of a certain checkpoint: its folder has its temporary name yet.
            step = EVERY * chance.randrange(1, STEPS // EVERY + 1)
            files = chance.randrange(4)
            wait_for(
                lambda name=f".step_{step:06d}.*", files=files, where=checkpoints: (
                    any(len(list(folder.iterdir())) >= files for folder in where.glob(name))
                    or (where / name[1:-2]).exists()
                ),
                end,
            )
        else:
            rows = chance.randrange(STEPS)
            wait_for(
                lambda log=folder / "metrics.jsonl", rows=rows: len(read_json_lines(log)) >= rows,
                end,
            )
            time.sleep(chance.uniform(0, 2 * duration / STEPS))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        inside += any(checkpoints.glob(".step_*"))
        done.append(len(read_json_lines(folder / "metrics.jsonl")))
        # Its second life goes on beside the first one of the next.
        if second is not None:
            finish(second)
        second = begin(folder)
    finish(second)
    for number in range(KILLS):
        folder = tmp_path / f"kill-{number}"
        assert outcome(folder) == expected, f"kill {number}: {(folder / 'lives.txt').read_text()}"
        assert not list((folder / "checkpoints").glob(".*"))
    report = (
        f"{KILLS} kills after {sorted(done)} steps, {inside} inside the writing of a checkpoint, "
        "all ended as the undisturbed run"
    )
    sys.stdout.write(f"\n{report}\n")
    assert inside >= 3, report


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest", "empty", "emptied list"])
def test_a_damaged_checkpoint_is_passed_over_and_told(begin, ended, tmp_path, damage):
    expected = outcome(ended)
    shutil.copytree(ended, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / f"step_{STEPS:06d}"
    weights, manifest = last / "optimizer.safetensors", last / "manifest.json"
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "empty":
        weights.write_bytes(b"")
    else:
        manifest.write_text("{}")
    finish(begin(tmp_path / "run"))
    second = (tmp_path / "run" / "lives.txt").read_text().splitlines()[1]
    assert second.startswith(f"from {STEPS - EVERY}, [") and last.name in second
    assert outcome(tmp_path / "run") == expected
