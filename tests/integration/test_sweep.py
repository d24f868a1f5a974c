"""Whole sweeps on real Ray: to the report, killed and resumed, with two workers, one recipe."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pyarrow.parquet as pq
import pytest
from clusters import JOINED, OF_A_CLUSTER, train_workers
from made import cli_command, cli_environment, run_cli

from raytune_vlm.prepare.store import open_split
from raytune_vlm.records import SweepFolder, read_json, read_json_lines
from raytune_vlm.train import checkpoint

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    *OF_A_CLUSTER,
]


def outcome(root):
    """Everything that must not depend on what happened on the way.

    A trial may come to another rung while the driver stops it: what counts is in the ledger.
    """
    folder = SweepFolder(root)
    result = folder.result()
    rows, trials = read_json_lines(folder.ledger_file), {}
    for trial_id in folder.trial_ids():
        trial = folder.trial(trial_id)
        own = [row for row in rows if row.get("trial_id") == trial_id]
        rungs = [row["step"] for row in own if row["event"] == "scored"]
        weights = sorted(
            trial.checkpoint(step) / "adapter_model.safetensors"
            for step in checkpoint.steps(trial.checkpoints)
            if step <= max(rungs)
        )
        trials[trial_id] = {
            "recipe": trial.record().recipe,
            "status": [row["event"] for row in own if row["event"] in ("finished", "stopped")],
            "scores": {s.step: s.metrics for s in trial.scores("select") if s.step in rungs},
            "weights": {
                file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in weights
            },
        }
    answers = pq.read_table(
        folder.trial(result.winner).evaluation("report", result.winner_step) / "predictions.parquet"
    )
    return {
        "winner": (result.winner, result.winner_step, result.naive, result.corrected),
        "paired": result.paired,
        "replicates": result.replicates,
        "trials": trials,
        "answers": answers.to_pydict(),
    }


def steps_logged(root, trial_id):
    return [row["step"] for row in read_json_lines(SweepFolder(root).trial(trial_id).metrics_file)]


def wait_for_events(file, event, count, process):
    end = time.monotonic() + 240
    while time.monotonic() < end:
        rows = read_json_lines(file)
        if sum(row["event"] == event for row in rows) >= count:
            return
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.05)
    raise AssertionError(f"no {count} x {event} in {file}")


def cut_off(folder, how, num_scored, *command):
    """The ledger after a command that got a signal after so many scores, and its exit status."""
    driver = subprocess.Popen(
        cli_command(*command),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=cli_environment(),
    )
    wait_for_events(folder / "ledger.jsonl", "scored", num_scored, driver)
    driver.send_signal(how)
    status = driver.wait(120)
    assert not (folder / "result.json").exists()
    return read_json_lines(folder / "ledger.jsonl"), status


STABLE = {
    # The own recipe learns something, all others nothing: after four of them nothing is open.
    "train": {
        "max_steps": 12, "warmup_steps": 2, "batch_size": 6, "micro_batch_size": 4,
        "learning_rate": 0.03,
    },
    "evaluation": {  # with the controls
        "metrics": ["cer@micro", "exact_match@strip"], "max_new_tokens": 6, "num_bootstrap": 200,
    },
    "sweep": {
        "num_trials": 40,
        "stop_when_stable": {"trials": 3},
        "num_replicates": 1,
        "scheduler": {"type": "asha", "grace_period": 4, "reduction_factor": 3},
        "search_space": {
            "lora.rank": {"type": "choice", "values": [2, 4]},
            "train.learning_rate": {"type": "loguniform", "lower": 1e-9, "upper": 1e-7},
        },
    },
}  # fmt: skip
ENDED = (
    "over the last 3 ended trials the 1 that cannot be told from the best stayed the same: t0000"
)


def test_a_sweep_killed_then_stopped_and_resumed_equals_the_undisturbed_one(write_experiment):
    file, whole = write_experiment("whole", **STABLE)
    done = run_cli("sweep", file)
    assert "Leaderboard of whole" in done.stdout and "next: raytune-vlm train" in done.stdout
    assert f"no new trials: {ENDED}" in " ".join(done.stdout.split())
    ended_when_stable(SweepFolder(whole))

    broken_file, broken = write_experiment("broken", **STABLE)
    killed, status = cut_off(broken, signal.SIGKILL, 2, "sweep", broken_file)
    assert status == -9
    stopped, status = cut_off(broken, signal.SIGTERM, 4, "resume", broken)
    assert status == 3
    ended = {row["trial_id"] for row in stopped if row["event"] in ("finished", "stopped")}
    for trial_id in set(SweepFolder(broken).trial_ids()) - ended:
        trial = SweepFolder(broken).trial(trial_id)
        saved = max(checkpoint.steps(trial.checkpoints), default=0)
        assert saved == trial.record().step, "a step was lost"
    run_cli("resume", broken)
    assert outcome(broken) == outcome(whole)
    after = read_json_lines(broken / "ledger.jsonl")
    assert stopped[: len(killed)] == killed and after[: len(stopped)] == stopped
    ended_when_stable(SweepFolder(broken))
    for event in ("proposed", "finished", "stopped"):
        ids = [row["trial_id"] for row in after if row["event"] == event]
        assert len(ids) == len(set(ids)), f"a trial was {event} twice"
    assert steps_logged(broken, "t0000") == steps_logged(whole, "t0000")

    (replicate,) = SweepFolder(broken).result().replicates
    assert replicate.seed == 1 and replicate.value is not None
    page = (broken / "report" / "index.html").read_text()
    assert "t0000" in page and page.count("<script") == 1
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (broken / "best" / name).stat().st_size > 0
    again = run_cli("resume", broken)
    assert "has ended already" in again.stdout
    validated = run_cli("validate", broken / "best" / "experiment.yaml")
    assert "valid" in validated.stdout
    refused = run_cli("sweep", file, check=False)
    assert refused.returncode == 2 and "holds a sweep already" in refused.stderr
    assert read_json_lines(broken / "ledger.jsonl") == after


def ended_when_stable(folder):
    """Ledger and page say why; nothing was begun from there on, and nothing is left open."""
    rows = read_json_lines(folder.ledger_file)
    assert [row["same"] for row in rows if row["event"] == "compared"] == [["t0000"]] * 4
    (closed,) = (place for place, row in enumerate(rows) if row["event"] == "closed")
    assert (rows[closed]["kind"], rows[closed]["message"]) == ("stable", ENDED)
    assert not {row["event"] for row in rows[closed:]} & {"proposed", "started", "scored"}
    assert [row["event"] for row in rows].count("proposed") == 4
    page = (folder.report / "index.html").read_text()
    assert "closed early" in page and ENDED in page
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder.study_file}")
    assert [trial.state.name for trial in study.trials] == ["PRUNED"] * 3  # the own is not in it


def test_two_workers_that_stream_and_are_killed_do_what_one_undisturbed_does(
    write_experiment, tmp_path, monkeypatch
):
    sections = {
        "train": {
            "max_steps": 15,
            "warmup_steps": 1,
            "batch_size": 4,
            "micro_batch_size": 2,
            "checkpoint_every": 2,
            "log_every": 1,
        },
        "lora": {"rank": 4, "scope": "text+vision"},
        "evaluation": {"metrics": ["cer@micro"], "max_new_tokens": 6, "every": 5},
        "sweep": {"scheduler": {"type": "fifo"}},
    }
    alone_file, alone = write_experiment("alone", own_data=True, **sections)
    take_images_from_every_other_row(tmp_path / "data" / "train.jsonl")
    run_cli("train", alone_file)
    assert read_json(SweepFolder(alone).manifest_file)["tier"] == "pixels"

    file, folder = write_experiment("account", own_data=True, **sections)
    overrides = (
        "train.log_samples=true",
        "data.consumption=streaming",
        "data.decode_threads=2",
    )
    with monkeypatch.context() as patch:
        patch.delenv(JOINED)  # all of its Ray dies with it
        killed_after(folder, 6, "train", file, *overrides, *TWO_WORKERS)
    run_cli("train", file, *overrides)

    assert read_json(SweepFolder(folder).manifest_file)["tier"] == "encoded"
    trial, other = SweepFolder(folder).trial("t0000"), SweepFolder(alone).trial("t0000")
    losses, expected = (
        [row["loss"] for row in read_json_lines(each.metrics_file)] for each in (trial, other)
    )
    assert len(expected) == 15 and losses == pytest.approx(expected, abs=1e-5)
    of_two, of_one = (
        {entry.step: entry.metrics for entry in each.scores("select")} for each in (trial, other)
    )
    assert of_two == of_one and sorted(of_two) == [5, 10, 15]
    every_sample_is_used_once_an_epoch(SweepFolder(folder))
    what_is_trained_is_scored_and_exported(file, folder, overrides)


TWO_WORKERS = ("train.num_workers=2", "train.backend=fsdp2")


def take_images_from_every_other_row(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows[::2]):
        row["images"] = []
        row["messages"][0]["content"] = [{"type": "text", "text": f"say {number}"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def killed_after(folder, step, *command):
    """Kill everything that a command has started once a checkpoint is there."""
    driver = subprocess.Popen(
        cli_command(*command),
        env=cli_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    trial = SweepFolder(folder).trial("t0000")
    end = time.monotonic() + 240
    while not (trial.checkpoint(step) / "manifest.json").exists():
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    for process in [*psutil.Process(driver.pid).children(recursive=True), driver]:
        process.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (trial.checkpoint(14) / "manifest.json").exists(), "killed too late"


def every_sample_is_used_once_an_epoch(folder):
    trial = folder.trial("t0000")
    used: dict[int, list[str]] = {}
    for rank in (0, 1):
        for row in read_json_lines(trial.samples / f"rank_{rank}.jsonl"):
            used.setdefault(row["step"], []).extend(row["ids"])
    assert sorted(used) == list(range(1, 16))
    assert all(len(ids) == 4 for ids in used.values())
    flat = [name for step in sorted(used) for name in used[step]]
    manifest = read_json(folder.manifest_file)
    store = Path(manifest["store"])
    known = open_split(store, store / f"{manifest['digest']}.index.arrow", "train").sample_ids
    assert len(known) == 30
    counts = Counter(flat)
    assert set(counts) == set(known) and set(counts.values()) == {2}  # 60 draws, two epochs
    alone = {row["step"] for row in read_json_lines(trial.samples / "rank_1.jsonl")}
    assert alone and max(alone) < 15, "one worker went on alone"
    plan = read_json(folder.plan_file)
    assert (plan["num_samples"], plan["batch_size"]) == (30, 4)
    states = [read_json(file) for file in trial.checkpoints.glob("*/state.json")]
    assert {state["plan_digest"] for state in states} == {plan["digest"]}


def what_is_trained_is_scored_and_exported(file, folder, overrides):
    again = run_cli("train", file, *overrides)
    assert "step_000015" in again.stdout
    scored = run_cli("evaluate", folder, "--trial", "t0000,base", "--split", "report")
    for who in ("t0000 step 15", "base step 0"):
        assert f"{who}: cer@micro" in scored.stdout
    assert "report was touched 2 times" in scored.stdout
    audit = SweepFolder(folder).trial("t0000").record().audit
    assert all(check["passed"] for check in audit.values())
    assert audit.keys() >= {"trainable", "gradients", "adapter_effect", "merge", "reload"}
    exported = run_cli("export", folder, "--output", folder / "adapter")
    errors = {
        entry.step: entry.metrics["cer@micro"].value
        for entry in SweepFolder(folder).trial("t0000").scores("select")
    }
    (step,) = re.findall(r"t0000, step (\d+): adapter in", exported.stdout)
    assert errors[int(step)] == min(errors.values()) and "vLLM" in exported.stdout
    assert (folder / "adapter" / "README.md").stat().st_size > 0
    place = folder / "trials/t0000/evaluations/report/step_000015/scores.json"
    assert json.loads(place.read_text())["num_samples"] == 8


def test_a_killed_worker_is_replaced_and_a_recipe_that_diverges_fails_alone(write_experiment):
    file, folder = write_experiment(
        "hot",
        train={"max_steps": 40, "warmup_steps": 2, "learning_rate": 10.0},
        sweep={
            "num_trials": 2,
            "include_default": False,
            "searcher": {"type": "grid"},
            "scheduler": {"type": "fifo"},
            "search_space": {"lora.alpha": {"type": "grid", "values": [4.0, 1e18]}},
        },
        lora={"rank": 2},
    )
    driver = subprocess.Popen(
        cli_command("sweep", file, "evaluation.every=4"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=cli_environment(),
    )
    wait_for_events(folder / "ledger.jsonl", "scored", 2, driver)
    (worker,) = train_workers()
    worker.kill()
    assert driver.wait(240) == 0
    events = [row for row in read_json_lines(folder / "ledger.jsonl") if "trial_id" in row]
    events = [row for row in events if row["trial_id"] == "t0000"]
    scored = [row["step"] for row in events if row["event"] == "scored"]
    assert scored == list(range(4, 41, 4))
    assert [row["event"] for row in events].count("finished") == 1
    steps = steps_logged(folder, "t0000")
    assert steps == sorted(set(steps))
    diverged = SweepFolder(folder).trial("t0001").record()
    assert diverged.status == "failed" and "not finite" in (diverged.failure or "")
