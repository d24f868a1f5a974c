"""What several evaluations on one split still lack of their answers, so that they can be asked in
shared batches.

Their stores then hold what an earlier life of each evaluation would have left there: each finds its
answers when it is scored, and what is written is what scoring it alone would have written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytune_vlm.sweep.comparing import (
    compared_rows,
    control_alterations,
    robustness_alterations,
    skipping,
)
from raytune_vlm.sweep.evaluation import Evaluation

if TYPE_CHECKING:
    from raytune_vlm.evaluate.generate import Prompts
    from raytune_vlm.evaluate.scoring import Prediction


@dataclass(frozen=True)
class PromptSet:
    """Prompts that a checkpoint is asked."""

    prompts: Prompts
    rows: list[int]
    place: str
    """The answers' folder in that of the evaluation."""
    made: dict[str, Any]
    """What else the answers depend on."""
    stage: str
    """What is shown."""


def prompt_sets(own: Evaluation) -> Iterator[PromptSet]:
    """All that an evaluation asks its model, in the order in which it does."""
    yield PromptSet(own.prompts, own.rows, "", {}, f"scoring {own.split}")
    for entry in (*control_alterations(own), *robustness_alterations(own)):
        try:
            prompts, rows = entry.make(compared_rows(own))
        except skipping():
            continue  # told by the evaluation of each checkpoint
        made = entry.made_with(own, prompts, rows)
        yield PromptSet(prompts, rows, entry.place, made, f"scoring {own.split}, {entry.name}")


class Lacking:
    """What some evaluations lack of a set's answers, and where these go; opened by every rank."""

    def __init__(self, evaluations: Mapping[str, Evaluation], asked: PromptSet) -> None:
        from raytune_vlm.evaluate.answers import AnswerStore

        stores = {name: AnswerStore(own.folder / asked.place) for name, own in evaluations.items()}
        known = {name: own.known(stores[name], asked.made) for name, own in evaluations.items()}
        ids = asked.prompts.sample_ids
        self.rows = {
            name: [row for row in asked.rows if ids[row] not in found]
            for name, found in known.items()
        }
        """Name of an evaluation -> what it is to be asked."""
        self.answered = {name: len(found) for name, found in known.items()}
        """Name -> how many answers there are."""
        self._writers = {
            name: store.writer(evaluations[name].worker.world.rank)
            for name, store in stores.items()
        }

    def keep(self, name: str, answers: Sequence[Prediction]) -> None:
        """Keep new answers of an evaluation."""
        self._writers[name].add(answers)
        self.answered[name] += len(answers)
