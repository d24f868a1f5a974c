"""One evaluation as an executor's worker does it, in a process of its own, without Ray.

python evaluation_worker.py FOLDER SPLIT SLOW_S

FOLDER holds `experiment.yaml` and `store/` (`prepared`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from made import write_data

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.prepare.prepare import list_shards
from raytune_vlm.prepare.shard import Preparer, TokenStep
from raytune_vlm.prepare.store import read_index, write_index_table
from raytune_vlm.records import BASE_TRIAL, DataManifest
from raytune_vlm.sweep.board import Word
from raytune_vlm.sweep.evaluate_job import run_evaluate
from raytune_vlm.sweep.heartbeat import Heartbeat
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.worker import ExecutorSetup, Worker


def prepared(folder: Path, model: Path, **evaluation: Any) -> ExperimentConfig:
    """Write data, an experiment and its token store, as `prepare` makes it."""
    if not (folder / "data").exists():
        write_data(folder / "data", num_train=2, num_other=10)
    plain = {
        "name": "small",
        "storage_path": str(folder / "runs"),
        "model": {"name": str(model)},
        "data": {
            "root": str(folder / "data"),
            "sources": [
                {"type": "messages", "path": f"{split}.jsonl", "split": split}
                for split in ("train", "select", "report")
            ],
        },
        "evaluation": {
            "metrics": ["cer@micro", "exact_match@strip"],
            "max_new_tokens": 4,
            "batch_size": 2,
            "num_bootstrap": 100,
            **evaluation,
        },
    }
    (folder / "experiment.yaml").write_text(json.dumps(plain))
    experiment = load_experiment(folder / "experiment.yaml")
    store = folder / "store"
    step, shards = TokenStep(Preparer(experiment, store)), list_shards(experiment)
    for shard in shards:
        step(shard)
    indices = [read_index(store / shard.key / "index.arrow") for shard in shards]
    write_index_table(store / "index.arrow", pa.concat_tables(indices))
    return experiment


class Alone(Worker):
    """A worker that nobody listens to: what it tells the board is kept."""

    def __init__(self, folder: Path, experiment: ExperimentConfig, slow_s: float = 0.0) -> None:
        manifest = DataManifest("d", str(folder / "store"), {}, {}, {})
        super().__init__(
            ExecutorSetup(
                "executor-0",
                experiment,
                str(folder / "runs" / "small"),
                manifest,
                str(folder / "store" / "index.arrow"),
                None,
                "",
            ),
            Heartbeat(None, "executor-0", 0, 60.0, "test"),
        )
        self.slow_s = slow_s
        self.progress: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []

    def told(self, job: Job, **progress: Any) -> Word:
        self.progress.append(progress)
        time.sleep(self.slow_s)
        return ""

    def report(self, job: Job, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def evaluate(self, split: str, trial_id: str = BASE_TRIAL, **job: Any) -> Path:
        """Score a checkpoint on a split; the evaluation's folder."""
        run_evaluate(self, Job("job", "evaluate", trial_id, {}, split=split, **job))
        return self.folder.trial(trial_id).evaluation(split, job.get("step", 0))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    worker = Alone(root, load_experiment(root / "experiment.yaml"), float(sys.argv[3]))
    worker.evaluate(sys.argv[2])
