"""A population through real Ray Tune, killed after its first exchange, and resumed."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from clusters import OF_A_CLUSTER
from made import cli_command, cli_environment, run_cli

from raytune_vlm.config.loader import load_experiment
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep.ledger import apply_event, replay
from raytune_vlm.sweep.population import Population

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    *OF_A_CLUSTER,
]

RATE = "train.learning_rate"
SWEEP = {
    "num_trials": 6,
    "include_default": False,
    "scheduler": {"type": "pbt", "interval": 2, "quantile": 0.34},
    "searcher": {"type": "random"},
    "search_space": {RATE: {"type": "loguniform", "lower": 1e-3, "upper": 1e-1}},
}


def decisions(rows, rule):
    """What the ledger did (`proposed`, `promoted`, `exploited`), and what the rule says to all
    before it."""
    states, decided = {}, 0
    for row in rows:
        name, trial_id = row["event"], row.get("trial_id")
        if name == "exploited":
            yield row["exploits"], rule.exploits(states.values(), row["step"], len(states))
            assert rule.due(states.values(), decided) == row["step"]
            decided = row["step"]
        elif name in ("proposed", "promoted"):
            action = rule.decide(states.values(), decided)
            done = ("start", "") if name == "proposed" else ("promote", trial_id)
            yield done, (action.kind, action.trial_id)
        apply_event(states, row)


def test_a_population_killed_after_an_exchange_goes_on_with_the_same_decisions(write_experiment):
    train = {"max_steps": 6, "warmup_steps": 1, "batch_size": 6, "log_every": 1}
    file, folder = write_experiment("population", sweep=SWEEP, train=train)
    driver = subprocess.Popen(
        cli_command("sweep", file),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=cli_environment(),
    )
    ledger, end = folder / "ledger.jsonl", time.monotonic() + 480
    while not ledger.exists() or '"exploited"' not in ledger.read_text():
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait(60)
    before = read_json_lines(ledger)
    output = run_cli("resume", folder).stdout

    after = read_json_lines(ledger)
    assert after[: len(before)] == before
    made = list(decisions(after, Population.of(load_experiment(file, ()))))
    assert all(done == said for done, said in made)
    exchanges = [row for row in after if row["event"] == "exploited"]
    assert [(row["step"], len(row["exploits"])) for row in exchanges] == [(2, 2), (4, 2)]
    scored = [(row["trial_id"], row["step"]) for row in after if row["event"] == "scored"]
    assert len(scored) == len(set(scored)), "a rung was computed twice"
    states, sweep = replay(ledger), SweepFolder(folder)
    assert len(states) == 10
    for state in states.values():
        assert state.ended == ("stopped" if state.replaced_by else "finished")
        assert state.message == state.leaves
        record, first = sweep.trial(state.trial_id).record(), 1
        assert (record.status, record.origin) == (state.ended, state.origin)
        if state.origin is not None:
            first = state.origin["step"] + 1
            continues_as_its_parent(sweep, state, states[state.origin["parent"]])
        assert list(losses(sweep, state)) == list(range(first, max(state.scored) + 1))
    tell_of_the_winner(sweep, states, output)


def losses(sweep, state):
    rows = read_json_lines(sweep.trial(state.trial_id).metrics_file)
    return {row["step"]: row["loss"] for row in rows}


def continues_as_its_parent(sweep, clone, parent):
    """The first step after the exchange: the same adapter, batch and dropout as the parent's."""
    ours, theirs = losses(sweep, clone), losses(sweep, parent)
    step = clone.origin["step"] + 1
    assert clone.recipe[RATE] != parent.recipe[RATE]
    if step in theirs:
        assert ours[step] == theirs[step]
        assert ours[step + 1] != theirs[step + 1], "another learning rate changed nothing"


def tell_of_the_winner(sweep, states, output):
    result = sweep.result()
    text = (sweep.best / "experiment.yaml").read_text()
    page = (sweep.report / "index.html").read_text()
    assert "replaced by" in page and "clone of" in page
    is_clone = states[result.winner].origin is not None
    assert ("NOT what was found" in text) == ("lineage: " in output) == is_clone
    assert ("trained from the beginning" in (sweep.best / "README.md").read_text()) == is_clone
    run_cli("validate", sweep.best / "experiment.yaml")
