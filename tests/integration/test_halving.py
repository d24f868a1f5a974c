"""Pausing and promoting through real Ray Tune, killed while trials are paused, and resumed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter

import pytest
from made import cli_command, cli_environment, run_cli

from raytune_vlm.config.loader import load_experiment
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep.ledger import apply_event, replay
from raytune_vlm.sweep.scheduler import Rule, decide

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SWEEP = {
    "num_trials": 6,
    "include_default": False,
    "scheduler": {"type": "halving", "grace_period": 2, "reduction_factor": 2},
    "searcher": {"type": "tpe", "num_startup_trials": 3},
    "search_space": {
        "train.learning_rate": {"type": "loguniform", "lower": 1e-3, "upper": 1e-1},
    },
}


def events(folder, name):
    return [row for row in read_json_lines(folder / "ledger.jsonl") if row["event"] == name]


def decisions(rows, rule):
    """What the ledger did (`proposed`, `promoted`), and what `decide` says to all before it."""
    states = {}
    for row in rows:
        name, trial_id = row["event"], row.get("trial_id")
        if name in ("proposed", "promoted"):
            action = decide(states.values(), rule)
            done = ("start", "") if name == "proposed" else ("promote", trial_id)
            yield done, (action.kind, action.trial_id)
        apply_event(states, row)


def test_a_sweep_killed_while_trials_are_paused_goes_on_with_the_same_decisions(write_experiment):
    train = {"max_steps": 8, "warmup_steps": 1, "batch_size": 6, "log_every": 1}
    file, folder = write_experiment("killed", sweep=SWEEP, train=train)
    driver = subprocess.Popen(
        cli_command("sweep", file),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=cli_environment(),
    )
    end = time.monotonic() + 480
    while not (folder / "ledger.jsonl").exists() or len(events(folder, "paused")) < 4:
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait(60)
    before = read_json_lines(folder / "ledger.jsonl")
    waiting = {row["trial_id"] for row in before if row["event"] == "paused"}
    started = Counter(row["trial_id"] for row in before if row["event"] == "started")
    run_cli("resume", folder)

    after = read_json_lines(folder / "ledger.jsonl")
    assert after[: len(before)] == before
    made = list(decisions(after, Rule.of(load_experiment(file, ()))))
    assert len(made) > 6
    assert all(done == said for done, said in made)
    scored = [(row["trial_id"], row["step"]) for row in after if row["event"] == "scored"]
    assert len(scored) == len(set(scored)), "a rung was computed twice"
    states = replay(folder / "ledger.jsonl")
    assert {state.ended for state in states.values()} == {"finished", "stopped"}
    for state in states.values():
        trial = SweepFolder(folder).trial(state.trial_id)
        steps = [row["step"] for row in read_json_lines(trial.metrics_file)]
        assert steps == list(range(1, max(state.scored) + 1))
        assert trial.record().status == state.ended
    left = [name for name in waiting if states[name].promoted_to is None]
    assert left, "nothing was paused for good"
    again = Counter(row["trial_id"] for row in after if row["event"] == "started")
    assert all(again[name] == started[name] for name in left), "a paused trial was started again"
