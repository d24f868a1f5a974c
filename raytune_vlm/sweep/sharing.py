"""Packed trials that are at a rung at the same time are asked in shared batches.

Each is then scored by itself, and finds its answers where an earlier life of it would have left
them (`lacking`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from raytune_vlm.errors import first_line
from raytune_vlm.sweep.evaluation import Evaluation, seconds_left
from raytune_vlm.sweep.lacking import Lacking, PromptSet, prompt_sets
from raytune_vlm.sweep.storage import storage_failure
from raytune_vlm.sweep.trial_job import Answered

if TYPE_CHECKING:
    from raytune_vlm.sweep.life import Life
    from raytune_vlm.sweep.worker import Worker


def sharing_of(worker: Worker, note: Callable[[str], None]) -> Sharing | None:
    """What lets a worker's slots share batches; None, and a note, where they are packed but cannot.

    `exact` promises each trial what it does alone.
    """
    if worker.experiment.sweep.packing == "exact":
        return None
    obstacle, train, family = None, worker.experiment.train, worker.base.family
    if worker.world.size > 1 or worker.backend.is_sharded(train):
        obstacle = f"train.backend={train.backend} with train.num_workers={train.num_workers}"
    elif not family.text_beside_images:
        obstacle = f"rows in the cross-attention of {family.model_type} are tiles, not samples"
    if obstacle is None:
        return Sharing(worker, note)
    note(f"slots are scored one by one: {obstacle}")
    return None


class Sharing:
    """Asks the prompts of several trials at a rung together; for one worker.

    Parameters
    ----------
    note
        Told when batches are shared for the first time, and why they are not any more.
    """

    def __init__(self, worker: Worker, note: Callable[[str], None]) -> None:
        self._worker, self._note = worker, note
        self._is_told = self._is_over = False
        self.step_s = 0.0
        """What the last step of all slots took."""
        self.score_s = 0.0
        """A trial's share of what the last scoring took."""

    def ready(self, due: Sequence[Life], training: Sequence[Life]) -> list[Life]:
        """Those at a rung that do not wait for others to come to theirs.

        One that waits is one slot that idles, and scoring it alone would let all of them: so it is
        worth as long as all would take to be scored one by one.
        """
        share = self._worker.experiment.select_share
        worth_s = self.score_s * (len(due) + len(training))
        near = {
            share(rung)
            for life in training
            if self._shares(life)
            for rung in life.run.experiment.rungs
            if 0 < (rung - life.run.steps_done) * self.step_s < worth_s
        }

        def waits(life: Life) -> bool:
            if not self._shares(life) or share(life.rung or 0) not in near:
                return False
            return not self._worker.told(
                life.job,
                trial_id=life.job.trial_id,
                stage="waits to be scored",
                step=life.rung,
                max_steps=life.run.config.max_steps,
            )

        return [life for life in due if not waits(life)]

    def answer(self, lives: Sequence[Life]) -> dict[str, Answered]:
        """Ask for what trials at a rung lack; job's id -> what it took, of those that shared."""
        slots = {
            life.job.job_id: life.slot.layers
            for life in lives
            if life.slot is not None and self._shares(life)
        }
        if len(slots) < 2:
            return {}
        taken: dict[str, Answered] = {}
        try:
            for group in self._groups([life for life in lives if life.job.job_id in slots]):
                taken |= self._answer(group, slots)
        except Exception as error:
            if failure := storage_failure(error, self._worker.folder):
                ray.get(self._worker.setup.board.halt.remote(failure))
                raise
            self._is_over = True
            what = f"{type(error).__name__} with {len(slots)} at once: {first_line(error)}"
            self._note(f"slots are scored one by one from here on: {what}")
        return taken

    def _shares(self, life: Life) -> bool:
        from raytune_vlm.models.lora import unmixable

        return not self._is_over and unmixable(life.run.experiment.lora) is None

    def _groups(self, lives: Sequence[Life]) -> list[dict[str, Evaluation]]:
        """Evaluations of the same prompts, by their jobs' ids; those that are alone left out."""
        groups: dict[tuple[int, ...], dict[str, Evaluation]] = defaultdict(dict)
        for life in lives:
            own = Evaluation(self._worker, life.job, None, "select", life.rung or 0)
            groups[tuple(own.rows)][life.job.job_id] = own
        return [group for group in groups.values() if len(group) > 1]

    def _answer(
        self, group: dict[str, Evaluation], slots: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Answered]:
        """Ask all that a group's evaluations ask."""
        if not self._is_told:
            self._note(f"trials at a rung share their batches, the first {', '.join(group)}")
            self._is_told = True
        lead, *_ = group.values()
        going, shares = group, []
        for asked in prompt_sets(lead):
            began = time.monotonic()
            going = self._ask(going, slots, asked)
            shares.append((time.monotonic() - began) / len(group))
        return dict.fromkeys(group, Answered(shares[0], sum(shares[1:])))

    def _ask(
        self,
        group: dict[str, Evaluation],
        slots: Mapping[str, Mapping[str, Any]],
        asked: PromptSet,
    ) -> dict[str, Evaluation]:
        """Ask one set, as long as two are left to ask; who was not stopped in the middle.

        One that is stopped is left out from there on, and hears of it when it is scored.
        """
        from raytune_vlm.packed.answering import answer_side_by_side

        while len(group) > 1:
            lacking = Lacking(group, asked)
            if not any(lacking.rows.values()):
                break
            stopped: set[str] = set()
            found = answer_side_by_side(
                self._worker.base,
                {name: slots[name] for name in group},
                asked.prompts,
                lacking.rows,
                self._worker.experiment.evaluation,
                device=self._worker.world.device,
                keep_going=self._progress(group, lacking, asked.stage, stopped),
                keep=lacking.keep,
                features=self._worker.features,
                say=self._worker.note_own,
            )
            if found is not None:
                break
            group = {name: own for name, own in group.items() if name not in stopped}
        return group

    def _progress(
        self, group: dict[str, Evaluation], lacking: Lacking, stage: str, stopped: set[str]
    ) -> Callable[[int], bool]:
        """Tells the board how far each is; whether to go on with all of them."""
        began, left = time.monotonic(), sum(map(len, lacking.rows.values()))
        asked = {name: lacking.answered[name] + len(rows) for name, rows in lacking.rows.items()}

        def keep_going(done: int) -> bool:
            seconds = seconds_left(began, done, left)
            for name, own in group.items():
                where = own.where(stage, lacking.answered[name], asked[name], seconds)
                if self._worker.told(own.job, **where):
                    stopped.add(name)
            return not stopped

        return keep_going
