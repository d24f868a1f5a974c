"""TensorBoard: one run a trial in `tensorboard/` of the sweep folder, with its recipe as hparams.

Event files can only be appended to, so each life of the sweep writes them anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from raytune_vlm.sweep.trackers.base import Kind, SweepFacts, Tracker

SWEEP_RUN = "sweep"
"""The run that holds what the sweep as a whole came to."""


class TensorBoard(Tracker):
    """Writes event files."""

    def __init__(self, facts: SweepFacts) -> None:
        self._facts = facts
        self._root = facts.folder / "tensorboard"
        if self._root.exists():
            shutil.rmtree(self._root)
        self._writers: dict[str, Any] = {}
        self._ends: dict[str, Any] = {}

    def start(self, trial_id: str, recipe: Mapping[str, Any], when: float) -> None:
        writer = self._open(trial_id)
        values = {key: _hparam(value) for key, value in recipe.items()}
        head, begin, self._ends[trial_id] = hparams(values, dict.fromkeys(self._facts.score_names))
        writer.file_writer.add_summary(head, walltime=when)
        writer.file_writer.add_summary(begin, walltime=when)

    def log(
        self, trial_id: str, kind: Kind, step: int, values: Mapping[str, float], when: float
    ) -> None:
        for name, value in values.items():
            self._writers[trial_id].add_scalar(name, value, step, walltime=when)

    def end(self, trial_id: str, status: str, message: str | None, when: float) -> None:
        writer = self._writers.pop(trial_id)
        writer.add_text("status", f"{status}: {message}" if message else status, walltime=when)
        writer.file_writer.add_summary(self._ends.pop(trial_id), walltime=when)
        writer.close()

    def decide(self, values: Mapping[str, float], winner: str, when: float) -> None:
        writer = self._open(SWEEP_RUN)
        for name, value in values.items():
            writer.add_scalar(name, value, 0, walltime=when)
        writer.add_text("winner", winner, walltime=when)

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _open(self, run: str) -> Any:
        writer = self._writers[run] = SummaryWriter(str(self._root / run))
        # A writer opens its file with the first thing that is written.
        writer._get_file_writer()
        return writer


def _hparam(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
