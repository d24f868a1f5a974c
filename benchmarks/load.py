"""The driver under load: 1,000 trials of a fake step, 100,000 samples, 10,000 refused rows.

    python benchmarks/load.py [--trials 100 300 1000] [--repeats 3]

A sweep without Ray and without a model: the real searcher (TPE), study, ledger, `halving` rule and
tally, and trial folders as a worker leaves them; a step takes no time, and a clock of its own makes
each sweep last 24 hours. Each size runs in a process of its own. Given are milliseconds of the
process's CPU a trial, memory, the ledger, and the page's time and size; then the plan of 100,000
samples and the reading and reporting of 10,000 refused rows.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DAY_S = 86_400.0
AT_ONCE = 8
NUM_SELECT = 100
METRIC, OTHER = "nted@donut", "field_f1@donut"


def experiment(num_trials: int) -> Any:
    """Four varied keys, rungs of 1, 3 and 9 times 50 steps."""
    from raytune_vlm.config import ExperimentConfig

    return ExperimentConfig.model_validate(
        {
            "name": "load",
            "data": {"sources": [{"type": "messages", "path": "x.jsonl"}]},
            "train": {"max_steps": 450},
            "evaluation": {"metrics": [METRIC, OTHER], "answer": "json_tags"},
            "sweep": {
                "num_trials": num_trials,
                "num_executors": AT_ONCE,
                "scheduler": {"type": "halving", "grace_period": 50, "reduction_factor": 3},
                "searcher": {"type": "tpe"},
                "search_space": {
                    "lora.rank": {"type": "choice", "values": [4, 8, 16, 32, 64]},
                    "train.learning_rate": {"type": "loguniform", "lower": 3e-5, "upper": 1e-2},
                    "lora.scope": {"type": "choice", "values": ["text", "text+projector"]},
                    "lora.dropout": {"type": "uniform", "lower": 0.0, "upper": 0.2},
                },
            },
        }
    )


@cache
def predictions() -> bytes:
    """The answers to `select`, the same for all trials."""
    rows = [
        {
            "sample_id": f"s{number}",
            "group_id": f"s{number}",
            "prompt": "Parse this document.",
            "reference": "<s_a>1</s_a>",
            "prediction": "<s_a>2</s_a>",
            "parsed": "{}",
            "num_tokens": 9,
            "truncated": False,
            METRIC: number / NUM_SELECT,
            f"{METRIC}/weight": 1.0,
            OTHER: 0.5,
            f"{OTHER}/weight": 1.0,
        }
        for number in range(NUM_SELECT)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


class FakeSweep:
    """What the driver and its workers do for a sweep, in one thread."""

    def __init__(self, folder: Path, num_trials: int) -> None:
        from raytune_vlm.records import SweepFolder, write_json
        from raytune_vlm.sweep import ledger
        from raytune_vlm.sweep.ledger_tail import LedgerTail
        from raytune_vlm.sweep.scheduler import Rule
        from raytune_vlm.sweep.searcher import OptunaSearcher
        from raytune_vlm.sweep.tally import Tally

        self.experiment = experiment(num_trials)
        self.folder = SweepFolder(folder)
        self.now = 1_790_000_000.0
        ledger.time = SimpleNamespace(time=lambda: self.now)  # type: ignore[attr-defined]
        self.rule = Rule.of(self.experiment)
        plain = self.experiment.model_dump(mode="json")
        write_json(self.folder.experiment_file, {"experiment": plain, "fingerprint": "x"})
        self.ledger = ledger.Ledger(self.folder.ledger_file)
        self.states: dict[str, Any] = {}
        self.searcher = OptunaSearcher(
            self.experiment, self.ledger, self.states, self.folder.study_file, None
        )
        self.tail = LedgerTail(self.folder.ledger_file)
        self.tally = Tally(self.experiment, self.folder)
        self.running: list[str] = []

    def run(self) -> None:
        """Until the rule says that nothing is left to do."""
        from raytune_vlm.sweep.scheduler import decide

        while True:
            action = decide(self.states.values(), self.rule)
            if action.kind == "start":
                self._start()
            elif action.kind == "promote":
                self.states[action.trial_id].promoted_to = action.step
                self.ledger.append("promoted", trial_id=action.trial_id, step=action.step)
                self._begin(action.trial_id)
            elif action.kind == "wait":
                self._reach_rung(self.running.pop(0))
            else:
                break
        for state in [state for state in self.states.values() if state.ended is None]:
            self._end(state, "stopped")

    def _start(self) -> None:
        config = self.searcher.suggest(f"tune-{len(self.states)}")
        assert isinstance(config, dict)
        self._begin(config["trial_id"])

    def _begin(self, trial_id: str) -> None:
        self.ledger.append("started", trial_id=trial_id)
        self.running.append(trial_id)

    def _reach_rung(self, trial_id: str) -> None:
        """What a worker writes at a rung, and what the driver does with it."""
        state = self.states[trial_id]
        rung = self.rule.target(state)
        earlier = max(state.scored, default=0)
        total = self.experiment.sweep.num_trials * 100  # steps of the sweep, roughly
        self.now += DAY_S * (rung - earlier) / total
        value = 1 - abs(math.log10(state.recipe["train.learning_rate"]) + 3) / 3
        value *= 1 - math.exp(-rung / 150)
        self._write_trial(state, rung, earlier, value)
        state.scored[rung] = {METRIC: value, OTHER: value / 2}
        state.costs[rung] = {"train_seconds": float(rung)}
        row = {"scores": state.scored[rung], "costs": state.costs[rung]}
        self.ledger.append("scored", trial_id=trial_id, step=rung, **row)
        if rung == self.rule.rungs[-1]:
            self._end(state, "finished")
        else:
            self.ledger.append("paused", trial_id=trial_id, step=rung)
        for event in self.tail.new():
            self.tally.add(event)

    def _write_trial(self, state: Any, rung: int, earlier: int, value: float) -> None:
        from raytune_vlm.records import MetricEstimate, Scores, write_json

        paths = self.folder.trial(state.trial_id)
        paths.root.mkdir(parents=True, exist_ok=True)
        with paths.metrics_file.open("a") as stream:
            for step in range(earlier + 5, rung + 1, 5):
                row = {"step": step, "loss": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3}
                stream.write(json.dumps(row) + "\n")
        estimates = {
            METRIC: MetricEstimate(value, value - 0.1, value + 0.1, 0.05),
            OTHER: MetricEstimate(value / 2, value / 2 - 0.1, value / 2 + 0.1, 0.05),
        }
        counts = {"num_samples": NUM_SELECT, "num_groups": NUM_SELECT}
        rates = {"parse_failure_rate": 0.1, "empty_rate": 0.0, "truncation_rate": 0.0}
        scores = Scores(state.trial_id, rung, "select", metrics=estimates, **counts, **rates)
        write_json(paths.evaluation("select", rung) / "scores.json", scores)
        (paths.evaluation("select", rung) / "predictions.parquet").write_bytes(predictions())
        self._record(state, "running", rung)

    def _record(self, state: Any, status: Any, step: int) -> None:
        from raytune_vlm.records import TrialRecord, write_json

        record = TrialRecord(state.trial_id, state.number, state.recipe, status, step, 450)
        write_json(self.folder.trial(state.trial_id).record_file, record)

    def _end(self, state: Any, how: Any) -> None:
        state.ended = how
        last = max(state.scored)
        self._record(state, how, last)
        self.ledger.append(how, trial_id=state.trial_id, step=last)
        self.searcher.tell(state)


def sweep(num_trials: int) -> dict[str, float]:
    """One sweep of this size and its page; CPU time, memory, sizes."""
    from raytune_vlm.report.html import build_report
    from raytune_vlm.sweep.ledger import replay

    with tempfile.TemporaryDirectory(prefix="load-") as name:
        fake = FakeSweep(Path(name) / "load", num_trials)
        before, began = _memory_mb(), time.process_time()
        fake.run()
        driven = time.process_time() - began
        after, began = _memory_mb(), time.process_time()
        list(fake.tally.figures())
        states = replay(fake.folder.ledger_file)
        assert len(states) == num_trials and all(state.ended for state in states.values())
        replayed = time.process_time() - began
        began = time.process_time()
        page = build_report(fake.folder.root)
        reported = time.process_time() - began
        return {
            "trials": num_trials,
            "simulated_h": (fake.now - 1_790_000_000.0) / 3600,
            "driver_ms_per_trial": 1e3 * driven / num_trials,
            "grown_mb": after - before,
            "ledger_kb_per_trial": fake.folder.ledger_file.stat().st_size / 1e3 / num_trials,
            "tally_and_replay_ms_per_trial": 1e3 * replayed / num_trials,
            "report_ms_per_trial": 1e3 * reported / num_trials,
            "report_s": reported,
            "report_kb_per_trial": page.stat().st_size / 1e3 / num_trials,
            "report_grown_mb": _memory_mb() - after,
        }


def samples(count: int) -> dict[str, float]:
    """The plan of so many samples, one epoch of it walked through."""
    import numpy as np

    from raytune_vlm.prepare.plan import Plan, PlanSpec

    before = _memory_mb()
    lengths = np.random.default_rng(0).integers(64, 2048, count)
    began = time.process_time()
    plan = Plan(lengths, np.zeros(count, dtype=int), PlanSpec(16, 0), data_digest="")
    plan.epoch(0)
    built = time.process_time() - began
    seen = sum(len(pack) for step in range(plan.num_steps(1)) for pack in plan.step(step))
    walked = time.process_time() - began - built
    return {
        "samples": count,
        "seen": seen,
        "plan_us_per_sample": 1e6 * built / count,
        "walk_us_per_sample": 1e6 * walked / count,
        "grown_mb": _memory_mb() - before,
    }


def refused(count: int) -> dict[str, float]:
    """So many rows that are all refused: read, written to `quarantine.jsonl`, shown on a page."""
    from raytune_vlm.config.data import ImageLimits
    from raytune_vlm.config.sources import ImageTextSource
    from raytune_vlm.prepare.prepare import write_quarantine
    from raytune_vlm.records import DataManifest, SweepFolder, by_kind, write_json
    from raytune_vlm.report.html import build_report
    from raytune_vlm.sources import SOURCES

    with tempfile.TemporaryDirectory(prefix="load-") as name:
        root = Path(name)
        rows = ({"image": f"missing-{number}.png", "text": "a"} for number in range(count))
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = ImageTextSource(type="image_text", path="rows.jsonl")
        reader, before, began = SOURCES[config.type], _memory_mb(), time.process_time()
        found: list[Any] = [
            entry
            for shard in reader.list_shards(config, root, False)
            for entry in reader.read_shard(config, shard, ImageLimits())
        ]
        read = time.process_time() - began
        folder = SweepFolder(root / "load")
        plain = experiment(8).model_dump(mode="json")
        write_json(folder.experiment_file, {"experiment": plain})
        write_quarantine(folder.quarantine_file, found)
        reasons = {first.reason: number for first, number in by_kind(found)}
        write_json(folder.manifest_file, asdict(DataManifest("", "", {}, reasons, {})))
        began = time.process_time()
        page = build_report(folder.root)
        return {
            "rows": count,
            "refused": len(found),
            "kinds": len(reasons),
            "read_us_per_row": 1e6 * read / count,
            "report_s": time.process_time() - began,
            "report_kb": page.stat().st_size / 1e3,
            "quarantine_kb": folder.quarantine_file.stat().st_size / 1e3,
            "grown_mb": _memory_mb() - before,
        }


def _memory_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


PARTS = {"sweep": sweep, "samples": samples, "refused": refused}


def measured(part: str, count: int, repeats: int) -> dict[str, float]:
    """Medians over processes of their own."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--part", part, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(runs[-1], file=sys.stderr, flush=True)
    return {name: median(run[name] for run in runs) for name in runs[0]}


def show(rows: list[dict[str, float]]) -> None:
    """A table with a row for each figure, and the ratio of the largest to the smallest size."""
    for name in rows[0]:
        values = [row[name] for row in rows]
        ratio = f"{values[-1] / values[0]:8.2f} x" if values[0] and len(rows) > 1 else ""
        print(f"{name:32}", *(f"{value:12,.2f}" for value in values), ratio)
    print(flush=True)


def main() -> None:
    """Measure everything, or one part in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", nargs=2)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part[0]](int(given.part[1]))))
        return
    show([measured("sweep", count, given.repeats) for count in given.trials])
    show([measured("samples", count, given.repeats) for count in (1_000, 100_000)])
    show([measured("refused", count, given.repeats) for count in (100, 10_000)])


if __name__ == "__main__":
    main()
