"""Scoring on a worker: prompts of a split are answered, scored, compared and stored.

The ranks of an executor share the prompts; rank 0 scores and writes. Answers are kept as they come
(`evaluate/answers.py`): an evaluation that was killed asks only for what is missing. Its own
`scores.json` is written last, after its controls, and says that all of it is there.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raytune_vlm.comparisons import CONTROLS_FILE, ROBUSTNESS_FILE
from raytune_vlm.records import BASE_TRIAL, Scores, read_json, write_json
from raytune_vlm.sweep.comparing import Comparing, compared_rows, note_on
from raytune_vlm.sweep.evaluation import Evaluation, EvaluationStopped
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.lacking import Lacking, PromptSet, prompt_sets

if TYPE_CHECKING:
    from raytune_vlm.evaluate.adapters import Adapter
    from raytune_vlm.sweep.worker import Worker


def evaluate(
    worker: Worker, job: Job, model: Any, split: str, step: int, *, seconds: float = 0.0
) -> Scores | None:
    """Generate, score and store one checkpoint on one split; None if stopped half-way.

    `seconds` is what its answers have taken before, together with those of other checkpoints.
    """
    from raytune_vlm.evaluate.answers import AnswerStore
    from raytune_vlm.evaluate.scoring import write_evaluation

    began = time.monotonic()
    own = Evaluation(worker, job, model, split, step)
    try:
        plain = own.answers(own.prompts, own.rows, own.folder, {}, f"scoring {split}")
        taken = seconds + time.monotonic() - began
        scores, table = own.score(plain, own.folder, taken)
        plain_by_id = {entry.sample_id: entry for entry in plain}
        comparing = Comparing(own, plain_by_id, compared_rows(own))
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
    """Score a job's checkpoints, or the base model, and report that once all are scored."""
    members = [replace(entry, job_id=job.job_id, others=()) for entry in (job, *job.others)]
    notes: list[tuple[str, str]] = []
    seconds = 0.0
    if len(members) > 1:
        try:
            notes, seconds = _answer_together(worker, members)
        except EvaluationStopped:
            return
    for member in members:
        scores = _score(worker, member, seconds)
        if scores is None:
            return
        if worker.world.rank == 0:
            place = worker.folder.trial(member.trial_id).evaluation(member.split, scores.step)
            file = place / CONTROLS_FILE
            found = read_json(file)["notes"] if file.exists() else []
            notes += [(member.trial_id, note) for note in found]
    worker.report(job, {"notes": notes, "done": True})


def _score(worker: Worker, job: Job, seconds: float) -> Scores | None:
    """Score one checkpoint, or the base model; None if stopped."""
    from raytune_vlm.models.adapter_file import load_adapter
    from raytune_vlm.models.lora import attach, detach
    from raytune_vlm.train.checkpoint import verify

    if job.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(worker.base.model, job.adapter)
        try:
            return evaluate(worker, job, model, job.split, job.step, seconds=seconds)
        finally:
            worker.base.model = detach(model)
    if job.trial_id == BASE_TRIAL:
        return evaluate(worker, job, worker.base.model, job.split, 0, seconds=seconds)
    recipe = worker.experiment.with_recipe(job.recipe)
    source = worker.folder.trial(job.trial_id).checkpoint(job.step)
    verify(source)
    with worker.backend.whole(worker.base) if recipe.lora.reads_weights else nullcontext():
        model = attach(worker.base.model, worker.base.family, recipe.lora, seed=recipe.seed)
    try:
        load_adapter(source, model)
        return evaluate(worker, job, model, job.split, job.step, seconds=seconds)
    finally:
        worker.base.model = detach(model)


def _answer_together(worker: Worker, jobs: list[Job]) -> tuple[list[tuple[str, str]], float]:
    """Ask for several checkpoints in shared batches; what is left to each then, says `lacking`.

    Returns
    -------
    Trial and why it was answered by itself, for those that were; seconds of each one's share of
    the plain answers.

    Raises
    ------
    EvaluationStopped
        If the job shall stop.
    """
    if worker.world.size > 1 and worker.backend.is_sharded(worker.experiment.train):
        reason = f"train.backend={worker.experiment.train.backend} cuts up the base"
        return [(job.trial_id, _apart(job, reason)) for job in jobs], 0.0
    own = {
        f"{job.trial_id}/{job.step}": Evaluation(worker, job, None, job.split, job.step)
        for job in jobs
    }
    adapters = {name: _adapter(worker, entry.job) for name, entry in own.items()}
    lead, *_ = own.values()
    lead.who = ", ".join(dict.fromkeys(job.trial_id for job in jobs))
    reasons: dict[str, str] = {}
    shares = []
    for asked in prompt_sets(lead):
        began = time.monotonic()
        reasons |= _ask_together(worker, own, adapters, asked)
        shares.append((time.monotonic() - began) / len(jobs))
    notes = [(own[name].job.trial_id, _apart(own[name].job, why)) for name, why in reasons.items()]
    return notes, shares[0]


def _apart(job: Job, reason: str) -> str:
    return f"{job.trial_id} was answered by itself on {job.split}: {reason}"


def _adapter(worker: Worker, job: Job) -> Adapter | None:
    """What a job puts on the base model; None for the base itself."""
    from raytune_vlm.evaluate.adapters import Adapter
    from raytune_vlm.train.checkpoint import verify

    if job.trial_id == BASE_TRIAL:
        return None
    recipe = worker.experiment.with_recipe(job.recipe)
    source = worker.folder.trial(job.trial_id).checkpoint(job.step)
    verify(source)
    return Adapter(source, recipe.lora, recipe.seed)


def _ask_together(
    worker: Worker,
    own: dict[str, Evaluation],
    adapters: dict[str, Adapter | None],
    asked: PromptSet,
) -> dict[str, str]:
    """Ask for what the stores of all evaluations lack; who was answered by itself, and why."""
    from raytune_vlm.evaluate.adapters import generate_many
    from raytune_vlm.evaluate.generate import deal

    world, (lead, *_) = worker.world, own.values()
    config = lead.asked.evaluation
    lacking = Lacking(own, asked)
    every = sorted(set().union(*lacking.rows.values()))
    if not every:
        return {}
    lengths = asked.prompts.lengths
    hand = set(deal(lengths, every, world.size, config.max_new_tokens)[world.rank])
    mine = {name: [row for row in left if row in hand] for name, left in lacking.rows.items()}
    before = sum(lacking.answered.values())
    found = generate_many(
        worker.base,
        adapters,
        asked.prompts,
        mine,
        config,
        device=world.device,
        keep_going=lead.progress(asked.stage, before, sum(map(len, mine.values()))),
        keep=lacking.keep,
        features=worker.features,
        say=worker.note_own,
    )
    if found is None:
        raise EvaluationStopped
    world.gather(None)  # every rank's answers are there
    return found.one_by_one
