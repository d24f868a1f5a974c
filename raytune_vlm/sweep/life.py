"""A trial in training on a worker, between its steps."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from raytune_vlm.packed.slot import Slot
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.trial_job import Turn
from raytune_vlm.train.run import Run


class Life:
    """A trial in training: by itself on the base, or parked in a slot while it does nothing.

    Parameters
    ----------
    turns
        `TrialJob.turns`, at its first step.
    parked
        Whether others share the base.
    """

    def __init__(
        self, job: Job, turns: Generator[Run, Turn, None], run: Run, device: str, *, parked: bool
    ) -> None:
        self.job, self.run = job, run
        self._turns = turns
        self.slot = Slot(run, device) if parked else None

    def go_on(self, turn: Turn) -> bool:
        """What follows a step; whether another is due."""
        with self._mounted():
            try:
                self._turns.send(turn)
            except StopIteration:
                return False
        return True

    def drop(self) -> None:
        """End where it stands, if it has not."""
        if self.run.is_attached:
            with self._mounted():
                self._turns.close()

    def _mounted(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.slot is None else self.slot.mounted()
