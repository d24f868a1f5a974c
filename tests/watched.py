"""A sweep folder that grows in two lives, as executor and driver write it, without training."""

from __future__ import annotations

import json
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
from made import experiment, picture

from raytune_vlm.records import (
    MetricEstimate,
    Scores,
    SweepFolder,
    SweepResult,
    TrialRecord,
    write_json,
)
from raytune_vlm.sweep.ledger import Ledger

METRIC = "exact_match@strip"
RECIPES = {
    "t0000": {"lora.rank": 4, "train.learning_rate": 1e-3, "lora.scope": "text"},
    "t0001": {"lora.rank": 8, "train.learning_rate": 2e-2, "lora.scope": "text+vision"},
}


def config(*trackers):
    return experiment(
        train={"max_steps": 20},
        evaluation={"metrics": [METRIC], "every": 10},
        sweep={
            "metric": METRIC,
            "num_trials": 2,
            "scheduler": {"type": "fifo"},
            "search_space": {
                "lora.rank": {"type": "choice", "values": [4, 8]},
                "lora.scope": {"type": "choice", "values": ["text", "text+vision"]},
                "train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
            },
        },
        report={"trackers": list(trackers)},
    )


class Watched:
    """The folder, and what happens in it."""

    def __init__(self, root):
        self.folder = SweepFolder(root)
        self.ledger = Ledger(self.folder.ledger_file)

    def tell(self, event, trial_id, **fields):
        self.ledger.append(event, trial_id=trial_id, **fields)

    def train(self, trial_id, first, last):
        """Lines of metrics.jsonl, with the times of the life that writes them."""
        file = self.folder.trial(trial_id).metrics_file
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = file.read_text().splitlines()[: first - 1] if file.exists() else []
        for step in range(first, last + 1):
            row = {"step": step, "loss": 1 / step, "skipped": False, "mfu": None}
            kept.append(json.dumps(row | {"time": 1000.0 + step + 100 * first}))
        file.write_text("\n".join(kept) + "\n")

    def score(self, trial_id, step, value, split="select"):
        estimate = MetricEstimate(value, value - 0.1, value + 0.1, 0.05)
        scores = Scores(trial_id, step, split, 4, 4, {METRIC: estimate}, 0.25, 0.0, 0.0)
        place = self.folder.trial(trial_id).evaluation(split, step)
        write_json(place / "scores.json", scores)
        columns = {
            "sample_id": ["aa", "bb"],
            "reference": ["tea", '{"answers": ["bun", "a bun"]}'],
            "prediction": ["tea", "<b>![x](http://x/y.png)|_|"],
            METRIC: [1.0, 0.0],
        }
        pq.write_table(pa.table(columns), place / "predictions.parquet")
        if split == "select":
            self.tell("scored", trial_id, step=step, scores={METRIC: value})

    def propose(self, trial_id):
        number = int(trial_id[1:])
        recipe = RECIPES[trial_id]
        self.tell("proposed", trial_id, number=number, recipe=recipe)
        self.tell("started", trial_id)
        record = TrialRecord(trial_id, number, recipe, "running")
        write_json(self.folder.trial(trial_id).record_file, asdict(record))

    def first_life(self):
        """One trial ends, the other is at step 14 when the driver dies."""
        self.score("base", 0, 0.1, "report")
        for trial_id in RECIPES:
            self.propose(trial_id)
            self.train(trial_id, 1, 14)
            self.score(trial_id, 10, 0.5)
        self.tell("stopped", "t0000", step=10, message=None)

    def second_life(self):
        """Steps 11 to 14 are done again; then comes the decision."""
        self.ledger.append("resumed")
        self.tell("started", "t0001")
        self.train("t0001", 11, 20)
        self.score("t0001", 20, 0.75)
        self.tell("finished", "t0001", step=20, message=None)
        self.score("t0001", 20, 0.7, "report")
        result = SweepResult(
            metric=METRIC, mode="max", winner="t0001", winner_step=20, default=None, naive=0.75,
            corrected=MetricEstimate(0.7, 0.6, 0.8, 0.05),
            report={"base": "base", "winner": "t0001"}, paired=[], indistinguishable=["t0001"],
            num_report_touches=2, seconds=1.0,
        )  # fmt: skip
        write_json(self.folder.result_file, result)
        self.tell("decided", "t0001", step=20)

    def write_pictures(self):
        """Two samples that are scored, and one of another split."""
        self.folder.gallery.mkdir(parents=True)
        for seed, name in enumerate(("aa", "bb", "00")):
            picture(seed).save(self.folder.gallery / f"{name}.jpg")
