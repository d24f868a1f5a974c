"""Weights & Biases: a run for each trial, in a group that has the sweep's name.

Without WANDB_MODE and without an API key runs are written offline, for `wandb sync`; a life of the
sweep writes those anew that an earlier one did not end. Online runs go on from the last step that
the server has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from raytune_vlm.sweep.trackers.base import Kind, SweepFacts, Tracker

PROJECT = "raytune_vlm"
"""Where WANDB_PROJECT is not set."""

SWEEP_RUN = "sweep"

ENDED = "ended"
"""File beside an offline run that has all that there is to be in it."""


class WeightsAndBiases(Tracker):
    """Writes runs, several open at once."""

    def __init__(self, facts: SweepFacts) -> None:
        self._facts = facts
        self._mode: Any = os.environ.get("WANDB_MODE")
        if not self._mode:
            self._mode = "online" if wandb.login(prompt=False) else "offline"
        self._ended: set[str] = set()
        """Names of the runs that an earlier life of the sweep ended."""
        self._runs: dict[str, Any] = {}
        self._last: dict[tuple[str, Kind], int] = {}
        if self._mode == "offline":
            mark = f"-{facts.sweep_id}-"
            for folder in (facts.folder / "wandb").glob(f"offline-run-*{mark}*"):
                if (folder / ENDED).exists():
                    self._ended.add(folder.name.rpartition(mark)[2])
                else:
                    shutil.rmtree(folder)

    def start(self, trial_id: str, recipe: Mapping[str, Any], when: float) -> None:
        if trial_id in self._ended:
            return
        run = self._open(trial_id, recipe)
        for kind in ("train", "select"):
            run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
            self._last[trial_id, kind] = int(run.summary.get(f"{kind}/step") or -1)

    def log(
        self, trial_id: str, kind: Kind, step: int, values: Mapping[str, float], when: float
    ) -> None:
        if trial_id not in self._ended and step > self._last[trial_id, kind]:
            self._last[trial_id, kind] = step
            self._runs[trial_id].log({f"{kind}/step": step, **values})

    def end(self, trial_id: str, status: str, message: str | None, when: float) -> None:
        if trial_id not in self._ended:
            self._runs[trial_id].summary.update({"status": status, "message": message})
            self._finish(trial_id, exit_code=1 if status == "failed" else 0)

    def decide(self, values: Mapping[str, float], winner: str, when: float) -> None:
        if SWEEP_RUN not in self._ended:
            run = self._open(SWEEP_RUN, self._facts.settings)
            run.summary.update({**values, "winner": winner})
            self._finish(SWEEP_RUN, exit_code=0)

    def flush(self) -> None:
        """Nothing: its own process sends and writes as it comes."""

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()

    def _finish(self, name: str, exit_code: int) -> None:
        run = self._runs.pop(name)
        run.finish(exit_code=exit_code)
        if self._mode == "offline":
            (Path(run.dir).parent / ENDED).touch()

    def _open(self, name: str, config: Mapping[str, Any]) -> Any:
        facts = self._facts
        run = self._runs[name] = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=facts.experiment.name,
            name=name,
            id=f"{facts.sweep_id}-{name}",
            config=dict(config),
            dir=str(facts.folder),
            mode=self._mode,
            resume="allow" if self._mode == "online" else None,
            reinit="create_new",
            save_code=False,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, x_disable_stats=True
            ),
        )
        return run
