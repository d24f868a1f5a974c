"""A trial in training on a worker, between its steps."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from raytune_vlm.packed.slot import Slot
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.trial_job import Answered, Pause, Turn


class Life:
    """A trial in training: by itself on the base, or parked in a slot while it does nothing.

    Parameters
    ----------
    turns
        `TrialJob.turns`, where it first waits.
    pause
        What it gave there.
    parked
        Whether others share the base.
    """

    def __init__(
        self,
        job: Job,
        turns: Generator[Pause, Turn | Answered, None],
        pause: Pause,
        device: str,
        *,
        parked: bool,
    ) -> None:
        self.job, self.run, self.rung = job, pause.run, pause.rung
        self._turns = turns
        self.slot = Slot(pause.run, device) if parked else None

    def go_on(self, after: Turn | Answered) -> bool:
        """What follows what it waited for; whether it waits again, for a step or to be scored."""
        with self._mounted():
            try:
                self.rung = self._turns.send(after).rung
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
