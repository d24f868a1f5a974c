"""`sweep.slots: auto`: an executor finds out how many slots pay, once in the life of a sweep."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from raytune_vlm.errors import EvaluationError
from raytune_vlm.records import BASE_TRIAL
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.ledger import events

if TYPE_CHECKING:
    from raytune_vlm.sweep.runner import Session
    from raytune_vlm.sweep.worker import Worker
    from raytune_vlm.train.run import Run


def find_slots(running: Session) -> None:
    """Put the number of slots in the place of `auto`: that of the ledger, or a measured one.

    Raises
    ------
    EvaluationError
        If the experiment's own recipe cannot be trained.
    """
    import ray

    sweep = running.experiment.sweep
    if sweep.slots != "auto":
        return
    known = [e for e in events(running.folder.ledger_file) if e["event"] == "planned"]
    if known:
        slots = int(known[-1]["slots"])
    else:
        job = Job("plan", "plan", BASE_TRIAL, {})
        ray.get(running.board.submit.remote(job))
        report = ray.get(running.board.next_report.remote(job.job_id))
        if "failed" in report:
            raise EvaluationError(f"planning the slots failed: {report['message']}")
        slots = report["slots"]
        running.ledger.append("planned", **{key: report[key] for key in ("slots", "probes")})
        tried = ", ".join(
            f"{probe['slots']}: {probe['tokens_per_second']:,.0f} tokens/s"
            for probe in report["probes"]
        )
        running.monitor.say(
            f"planner: {slots} slots of each executor with the experiment's own recipe ({tried}; "
            f"{report['reason']})"
        )
    ray.get(running.board.limit_slots.remote(slots))
    planned = sweep.model_copy(update={"slots": slots})
    running.experiment = running.experiment.model_copy(update={"sweep": planned})


def run_plan(worker: Worker, job: Job) -> None:
    """Measure 1, 2, 4, ... slots of the experiment's own recipe, and report."""
    from raytune_vlm.packed.planner import chosen, measure
    from raytune_vlm.train.batches import TrainingData
    from raytune_vlm.train.run import Run

    experiment, data = worker.experiment, worker.setup.data
    consumed = TrainingData(data.digest, data.store, worker.setup.index_file, data.tier)
    features = None if experiment.data.augmentation else worker.features

    def make(number: int) -> Run:
        seeded = experiment.with_recipe({"seed": experiment.seed + number})
        return Run(
            worker.base,
            worker.splits["train"],
            seeded,
            worker.world,
            consumed,
            features=features,
            teacher=worker.teacher(seeded),
        )

    most = math.ceil(experiment.sweep.num_trials / experiment.sweep.num_executors)
    assert worker.host is not None, "slots=auto has a host"
    probes, reason = measure(worker.host, make, worker.world, most, worker.beat)
    found = {"slots": chosen(probes), "probes": [asdict(probe) for probe in probes]}
    worker.report(job, {**found, "reason": reason, "done": True})
