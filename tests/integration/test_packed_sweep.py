"""Several trials at once on one base: every trial ends as by itself, also where the worker dies."""

from __future__ import annotations

import subprocess
import time

import pytest
from clusters import OF_A_CLUSTER, train_workers
from made import cli_command, cli_environment, run_cli

from raytune_vlm.records import SweepFolder, read_json_lines

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    *OF_A_CLUSTER,
]

TRAIN = {"max_steps": 8, "warmup_steps": 2, "batch_size": 6, "micro_batch_size": 4, "log_every": 1}
SWEEP = {
    "num_trials": 4,
    "include_default": False,
    "searcher": {"type": "grid"},
    "scheduler": {"type": "fifo"},
    "search_space": {
        "lora.rank": {"type": "grid", "values": [2, 4]},
        "lora.dora": {"type": "grid", "values": [False, True]},
    },
}
SLOTS = {"train": TRAIN, "lora": {"dropout": 0.1}}


def trials(root):
    """Recipe -> its scores, and the losses that it logged."""
    folder = SweepFolder(root)
    found = {}
    for trial_id in folder.trial_ids():
        trial = folder.trial(trial_id)
        if "/" in trial_id:
            continue
        scores = {entry.step: entry.metrics for entry in trial.scores("select")}
        losses = [row["loss"] for row in read_json_lines(trial.metrics_file)]
        assert trial.record().status == "finished"
        assert [row["step"] for row in read_json_lines(trial.metrics_file)] == list(range(1, 9))
        found[str(sorted(trial.record().recipe.items()))] = (scores, losses)
    assert len(found) == 4
    return found


def events(folder, name):
    return [row for row in read_json_lines(folder / "ledger.jsonl") if row["event"] == name]


def sweep_that_loses_its_worker(file, folder):
    """Run a sweep; kill its executor's worker as soon as a first score is there."""
    driver = subprocess.Popen(
        cli_command("sweep", file),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=cli_environment(),
    )
    end = time.monotonic() + 240
    while not (folder / "ledger.jsonl").exists() or not events(folder, "scored"):
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    (worker,) = train_workers()
    worker.kill()
    shown, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, shown
    return shown


def test_trials_that_share_a_base_end_as_by_themselves(write_experiment):
    file, alone = write_experiment("alone", sweep=SWEEP, **SLOTS)
    run_cli("sweep", file, "evaluation.every=4")
    expected = trials(alone)

    on_disk = {**SLOTS, "train": {**TRAIN, "feature_disk_gb": 0.1}}
    file, folder = write_experiment("exact", sweep={**SWEEP, "slots": 3}, **on_disk)
    file.write_text(file.read_text().replace("evaluation:", "evaluation:\n  every: 4", 1))
    shown = sweep_that_loses_its_worker(file, folder)
    assert trials(folder) == expected
    retried = shown.count("attempt 2")
    assert retried == 3, "all that were in training go on, each by itself"
    assert "features of images: up to 0.1 GB of each node's disk" in shown
    assert list((folder.parent / "prepared" / "features").glob("*/*.features.arrow"))

    packed = {**SWEEP, "slots": 4, "packing": "fast"}
    file, folder = write_experiment("fast", sweep=packed, **on_disk)
    shown = run_cli("sweep", file, "evaluation.every=4").stdout
    assert shown.count("steps and is scored by itself: lora.dora=true") == 2
    assert shown.count("trials at a rung share their batches") == 1
    for recipe, (scores, losses) in trials(folder).items():
        assert losses == pytest.approx(expected[recipe][1], rel=1e-4)
        assert scores == expected[recipe][0]
