"""Scoring on a worker: prompts of a split are answered, scored, compared and stored.

The ranks of an executor share the prompts; rank 0 scores and writes. Answers are kept as they come
(`evaluate/answers.py`): an evaluation that was killed asks only for what is missing. Its own
`scores.json` is written last, after its controls, and says that all of it is there.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from raytune_vlm.comparisons import CONTROLS_FILE, ROBUSTNESS_FILE
from raytune_vlm.records import BASE_TRIAL, Scores, read_json, write_json
from raytune_vlm.sweep.comparing import Comparing, note_on
from raytune_vlm.sweep.evaluation import Evaluation, EvaluationStopped
from raytune_vlm.sweep.jobs import Job

if TYPE_CHECKING:
    from raytune_vlm.sweep.worker import Worker


def evaluate(worker: Worker, job: Job, model: Any, split: str, step: int) -> Scores | None:
    """Generate, score and store one checkpoint on one split; None if stopped half-way."""
    from raytune_vlm.evaluate.answers import AnswerStore
    from raytune_vlm.evaluate.scoring import write_evaluation

    began = time.monotonic()
    own = Evaluation(worker, job, model, split, step)
    try:
        plain = own.answers(own.prompts, own.rows, own.folder, {}, f"scoring {split}")
        scores, table = own.score(plain, own.folder, time.monotonic() - began)
        limit = worker.experiment.evaluation.controls_samples
        chosen = set(own.prompts.fixed_choice(limit))
        rows = [row for row in own.rows if row in chosen]
        comparing = Comparing(own, {entry.sample_id: entry for entry in plain}, rows)
        controls, robustness = comparing.controls(), comparing.robustness()
    except EvaluationStopped:
        return None
    if worker.world.rank == 0:
        for name, found in ((CONTROLS_FILE, controls), (ROBUSTNESS_FILE, robustness)):
            (own.folder / name).unlink(missing_ok=True)
            if found is not None:
                write_json(own.folder / name, found)
        note_on(own.trial, split, controls.notes if controls else ())
        write_evaluation(own.folder, scores, table)
        for folder in (own.folder, *own.folder.glob("*/*/")):
            AnswerStore(folder).clear()
    return scores


def run_evaluate(worker: Worker, job: Job) -> None:
    """Score a checkpoint of a trial, or the base model, and report it."""
    from raytune_vlm.models.adapter_file import load_adapter
    from raytune_vlm.models.lora import attach, detach
    from raytune_vlm.train.checkpoint import verify

    if job.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(worker.base.model, job.adapter)
        try:
            scores = evaluate(worker, job, model, job.split, job.step)
        finally:
            worker.base.model = detach(model)
    elif job.trial_id == BASE_TRIAL:
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
        file = worker.folder.trial(job.trial_id).evaluation(job.split, scores.step) / CONTROLS_FILE
        notes = read_json(file)["notes"] if worker.world.rank == 0 and file.exists() else []
        worker.report(job, {"step": job.step, **values, "notes": notes, "done": True})
