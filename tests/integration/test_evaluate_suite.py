"""Benchmarks through real Ray: a model on all of them, and the guard of a sweep."""

from __future__ import annotations

import re
import subprocess
import time

import pyarrow.parquet as pq
import pytest
from clusters import OF_A_CLUSTER
from made import cli_command, cli_environment, run_cli

from raytune_vlm.evaluate.benchmarks import BENCHMARKS
from raytune_vlm.records import SweepFolder, read_json, read_json_lines

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    *OF_A_CLUSTER,
]


def test_a_model_on_every_benchmark_prints_the_card(tmp_path):
    command = (
        "evaluate", "tiny:idefics3", "--benchmarks", "all", "--data", "fixtures",
        f"storage_path={tmp_path}",
    )  # fmt: skip
    shown = run_cli(*command).stdout
    folder = SweepFolder(tmp_path / "evaluations" / "tiny-idefics3").trial("base")
    card = read_json(folder.card.with_suffix(".json"))
    assert {row["benchmark"] for row in card["rows"]} == {f"{name}-fixtures" for name in BENCHMARKS}
    for name, entry in BENCHMARKS.items():
        assert all(f"{name}-fixtures  " in shown for _ in entry.metrics)
        place = folder.evaluation(f"{name}-fixtures", 0)
        scores = read_json(place / "scores.json")
        assert set(scores["metrics"]) == set(entry.metrics)
        assert scores["benchmark"]["quarantined"] == 0
        assert len(pq.read_table(place / "predictions.parquet")) == scores["num_samples"] > 4
        assert (place / "submission.json").exists() == (entry.submission is not None)


def test_the_guard_of_a_sweep_whose_budget_ends(tiny_model, write_experiment):
    file, root = write_experiment(
        model={"name": str(tiny_model("idefics3"))},
        train={"max_steps": 6, "warmup_steps": 1, "batch_size": 4},
        evaluation={
            "metrics": ["cer@micro"],
            "every": 1,
            "max_new_tokens": 2,
            "num_bootstrap": 100,
            "guard": ["chartqa", "docvqa"],
            "guard_data": "fixtures",
            "guard_samples": 4,
        },
        sweep={"num_trials": 40, "scheduler": {"type": "fifo"}, "search_space": {
            "lora.rank": {"type": "choice", "values": [2, 4]}}},
    )  # fmt: skip
    folder = SweepFolder(root)
    command = cli_command("sweep", file)
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=cli_environment()
    )
    end = time.monotonic() + 240
    while not any(row["event"] == "started" for row in read_json_lines(folder.ledger_file)):
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    run_cli("control", root, "set-budget", "max_wall_time_s=0.5")
    shown, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, shown
    assert "no new trials and running ones end at their next rung: sweep.max_wall_time_s" in shown
    ended_by_its_budget(read_json_lines(folder.ledger_file))

    result = folder.result()
    assert {(entry.benchmark, entry.role) for entry in result.guard} == {
        (f"{name}-fixtures-limit-4", role)
        for name in ("chartqa", "docvqa")
        for role in result.report
    }
    for entry in result.guard:
        assert entry.num_samples == 4
        assert (entry.against_base is None) == (entry.role == "base")
    page = (root / "report" / "index.html").read_text()
    assert "docvqa-fixtures-limit-4" in page and "the guard" in page


def ended_by_its_budget(rows):
    """The ledger says why; from there nothing is begun, and what runs is scored once more."""
    (closed,) = (place for place, row in enumerate(rows) if row["event"] == "closed")
    assert rows[closed]["kind"] == "budget"
    assert re.fullmatch(r"sweep\.max_wall_time_s=0\.5 is used up \(.+\)", rows[closed]["message"])
    later = [(row["event"], row["trial_id"]) for row in rows[closed:] if "trial_id" in row]
    begun = {row["trial_id"] for row in rows[:closed] if row["event"] == "proposed"}
    ended = {row["trial_id"] for row in rows if row["event"] in ("finished", "stopped")}
    assert begun == ended and len(begun) < 40
    assert not any(event in ("proposed", "started") for event, _ in later)
    assert all(later.count(("scored", trial_id)) <= 1 for trial_id in begun)
