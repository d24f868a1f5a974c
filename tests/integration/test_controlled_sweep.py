"""A real sweep under the hand of a person: stop, pause, resume, clone, pin and drain."""

from __future__ import annotations

import subprocess
import time

import optuna
import pytest
from click.testing import CliRunner
from clusters import OF_A_CLUSTER
from made import cli_command, cli_environment

from raytune_vlm.cli import cli
from raytune_vlm.errors import ConfigError
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep.ledger import replay

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    *OF_A_CLUSTER,
]

SWEEP = {
    "num_trials": 40,
    "include_default": False,
    "scheduler": {"type": "halving", "grace_period": 2, "reduction_factor": 2},
    "searcher": {"type": "random"},
    "search_space": {
        "lora.rank": {"type": "choice", "values": [2, 4]},
        "train.learning_rate": {"type": "loguniform", "lower": 1e-3, "upper": 1e-1},
    },
}


class Person:
    """Looks at the ledger and gives commands, in this process."""

    def __init__(self, folder, driver):
        self.folder, self.driver = folder, driver

    def rows(self, event, trial_id=None):
        found = [r for r in read_json_lines(self.folder / "ledger.jsonl") if r["event"] == event]
        return [r for r in found if trial_id in (None, r.get("trial_id"))]

    def wait(self, event, trial_id=None, count=1):
        end = time.monotonic() + 240
        while len(self.rows(event, trial_id)) < count:
            assert self.driver.poll() is None and time.monotonic() < end, (event, trial_id)
            time.sleep(0.02)
        return self.rows(event, trial_id)[count - 1]

    def ask(self, *words):
        done = CliRunner().invoke(cli, ["control", str(self.folder), *words])
        if isinstance(done.exception, ConfigError):
            return f"refused: {done.exception.message}".replace("refused: refused", "refused")
        assert done.exit_code == 0, done.exception
        return done.output

    def status(self, trial_id):
        shown = CliRunner().invoke(cli, ["status", str(self.folder)]).output
        (line,) = [row for row in shown.splitlines() if row.startswith(trial_id)]
        return line


def test_a_sweep_does_what_it_is_told_while_it_runs(write_experiment):
    train = {"max_steps": 8, "warmup_steps": 1, "batch_size": 6, "log_every": 1}
    file, folder = write_experiment("steered", sweep=SWEEP, train=train)
    output = folder.parent.parent / "driver.txt"
    with output.open("wb") as stream:
        driver = subprocess.Popen(
            cli_command("sweep", file),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=cli_environment(),
        )
    person = Person(folder, driver)
    try:
        steer(person)
    finally:
        driver.kill()
    check(SweepFolder(folder), person)


def steer(person):
    person.wait("started", "t0000")
    assert "no trial 't9'" in person.ask("stop", "t9")
    person.wait("scored", "t0000")
    assert "from 0.001 to 0.1" in person.ask("clone", "t0000", "train.learning_rate=3")
    parent = person.rows("scored")[-1]["trial_id"]
    rank = replay(person.folder / "ledger.jsonl")[parent].recipe["lora.rank"]
    assert "with a fresh optimizer" in person.ask("clone", parent, f"lora.rank={6 - rank}")
    clone = person.rows("control")[-1]["clone"]["trial_id"]
    person.wait("started", clone)
    assert "clone of" in person.status(clone)

    assert "is saved and paused" in person.ask("pause", clone)
    assert "paused by hand" in person.status(clone)
    assert "already" in person.ask("pause", clone)
    stopped = person.wait("started", count=len(person.rows("started")) + 1)["trial_id"]
    assert "is kept" in person.ask("stop", stopped)
    assert person.wait("stopped", stopped)["message"] == "stopped by hand"
    assert "has ended already (stopped)" in person.ask("stop", stopped)
    assert "whatever its scores" in person.ask("pin", "t0000")
    assert "pinned" in person.status("t0000")
    person.wait("promoted", "t0000")
    assert "num_trials 40 -> 41" in person.ask("extend", "num_trials=1")
    assert not person.rows("promoted", clone) and not person.rows("finished", clone)
    assert "goes on" in person.ask("resume", clone)
    assert "whatever its scores" in person.ask("pin", clone)
    assert "no new trials" in person.ask("drain")
    assert person.driver.wait(300) == 0


def check(folder, person):
    states = replay(folder.ledger_file)
    rows = person.rows("control")
    clone, stopped = (
        next(row for row in rows if row["command"] == name and row["accepted"])
        for name in ("clone", "stop")
    )
    name = clone["clone"]["trial_id"]
    assert states["t0000"].ended == states[name].ended == "finished"
    assert states[stopped["trial_id"]].message == "stopped by hand"
    assert [row["kind"] for row in person.rows("closed")] == ["drained"]
    assert len(states) < 41
    steps = [row["step"] for row in read_json_lines(folder.trial(name).metrics_file)]
    first = clone["clone"]["origin"]["step"] + 1
    assert steps == list(range(first, 9)), "a step was lost or done twice over the pause"
    notes = [row["message"] for row in person.rows("noted", name)]
    assert any("optimizer state is fresh" in note and "rank of text" in note for note in notes)

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder.study_file}")
    told = {trial.user_attrs["trial"]: trial for trial in study.trials}
    assert told[stopped["trial_id"]].state.name == "PRUNED"
    assert told[stopped["trial_id"]].user_attrs["message"] == "stopped by hand"
    assert told[name].user_attrs["parent"].startswith(clone["trial_id"])
    page = (folder.report / "index.html").read_text()
    assert "stopped by hand" in page and f"clone of {clone['trial_id']}" in page
    assert "has ended" in person.ask("stop", "t0000")
