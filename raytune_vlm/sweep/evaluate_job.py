"""Scoring on a worker: prompts of a split are answered, scored and stored.

The ranks of an executor share the prompts; rank 0 scores and writes.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from raytune_vlm.records import BASE_TRIAL, Scores
from raytune_vlm.sweep.jobs import Job

if TYPE_CHECKING:
    from raytune_vlm.sweep.worker import Worker


def evaluate(worker: Worker, job: Job, model: Any, split: str, step: int) -> Scores | None:
    """Generate, score and store one checkpoint on one split; None if stopped half-way."""
    from raytune_vlm.evaluate.generate import Together, generate
    from raytune_vlm.evaluate.scoring import score, write_evaluation
    from raytune_vlm.prepare.blank import blank_sample

    began = time.monotonic()
    rows = worker.rows[split]
    mine = rows[worker.world.rank :: worker.world.size]
    together = None
    if worker.world.size > 1 and worker.backend.is_sharded(worker.experiment.train):
        mine = mine or rows[:1]
        blank = blank_sample(worker.base, worker.splits[split])
        together = Together(lambda count: max(worker.world.gather(count)), blank)
    found = generate(
        model,
        worker.base,
        worker.splits[split],
        mine,
        worker.experiment.evaluation,
        device=worker.world.device,
        keep_going=lambda: (
            worker.beat()
            and (
                worker.world.size > 1
                or not worker.stopped(
                    job, trial_id=job.trial_id, stage=f"scoring {split}", step=step
                )
            )
        ),
        together=together,
    )
    if found is None:
        return None
    by_id = {entry.sample_id: entry for part in worker.world.gather(found) for entry in part}
    gathered = [by_id[worker.splits[split].sample_ids[row]] for row in rows]
    evaluation = worker.experiment.evaluation
    scores, table = score(
        gathered,
        trial_id=job.trial_id,
        step=step,
        split=split,
        metrics=evaluation.metrics,
        answer=evaluation.answer,
        confidence=evaluation.confidence,
        num_bootstrap=evaluation.num_bootstrap,
        seed=worker.experiment.seed,
        seconds=time.monotonic() - began,
    )
    if worker.world.rank == 0:
        folder = worker.folder.trial(job.trial_id).evaluation(split, step)
        write_evaluation(folder, scores, table)
    return scores


def run_evaluate(worker: Worker, job: Job) -> None:
    """Score a checkpoint of a trial, or the base model, and report it."""
    from raytune_vlm.models.adapter_file import load_adapter
    from raytune_vlm.models.lora import attach, detach
    from raytune_vlm.train.checkpoint import verify

    if job.trial_id == BASE_TRIAL:
        scores = evaluate(worker, job, worker.base.model, job.split, 0)
    else:
        recipe = worker.experiment.with_recipe(job.recipe)
        source = worker.folder.trial(job.trial_id).checkpoint(job.step)
        verify(source)
        with worker.backend.whole(worker.base) if recipe.lora.reads_weights else nullcontext():
            model = attach(worker.base.model, worker.base.family, recipe.lora, seed=recipe.seed)
        try:
            load_adapter(source, model)
            scores = evaluate(worker, job, model, job.split, job.step)
        finally:
            worker.base.model = detach(model)
    if scores is not None:
        values = {name: entry.value for name, entry in scores.metrics.items()}
        worker.report(job, {"step": job.step, **values, "done": True})
