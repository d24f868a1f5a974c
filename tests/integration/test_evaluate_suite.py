"""Benchmarks through real Ray: a model on all of them, and the guard of a sweep."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from made import run_cli

from raytune_vlm.evaluate.benchmarks import BENCHMARKS
from raytune_vlm.records import SweepFolder, read_json

pytestmark = [pytest.mark.integration, pytest.mark.slow]


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


def test_the_guard_of_a_sweep(tiny_model, write_experiment):
    file, folder = write_experiment(
        model={"name": str(tiny_model("idefics3"))},
        train={"max_steps": 2, "warmup_steps": 1, "batch_size": 4},
        evaluation={
            "metrics": ["cer@micro"],
            "max_new_tokens": 2,
            "num_bootstrap": 100,
            "guard": ["chartqa", "docvqa"],
            "guard_data": "fixtures",
            "guard_samples": 4,
        },
        sweep={"num_trials": 2, "scheduler": {"type": "fifo"}, "search_space": {
            "lora.rank": {"type": "choice", "values": [2, 4]}}},
    )  # fmt: skip
    run_cli("sweep", file)
    result = SweepFolder(folder).result()
    assert {(entry.benchmark, entry.role) for entry in result.guard} == {
        (f"{name}-fixtures-limit-4", role)
        for name in ("chartqa", "docvqa")
        for role in result.report
    }
    for entry in result.guard:
        assert entry.num_samples == 4
        assert (entry.against_base is None) == (entry.role == "base")
    page = (folder / "report" / "index.html").read_text()
    assert "docvqa-fixtures-limit-4" in page and "the guard" in page
