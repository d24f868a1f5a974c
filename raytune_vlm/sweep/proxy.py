"""The proxy: Ray Tune's trial, without torch; it hands a recipe to the board and relays reports."""

from __future__ import annotations

from typing import Any

import ray
from ray import tune

from raytune_vlm.sweep.jobs import Job


class Proxy(tune.Trainable):
    """One trial as Ray Tune sees it. `config` has `board`, `trial_id`, `recipe`, `reported`,
    and `until` where a scheduler pauses."""

    def setup(self, config: dict[str, Any]) -> None:
        self._board = config["board"]
        self._prepare(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._prepare(new_config)
        return True

    def _prepare(self, config: dict[str, Any]) -> None:
        self._trial_id = config["trial_id"]
        # Put up with the first step only: where an actor of another trial becomes free first, Ray
        # Tune drops the one that it was starting, perhaps after its `setup`.
        self._job: Job | None = Job(
            job_id=self._trial_id,
            kind="trial",
            trial_id=self._trial_id,
            recipe=config["recipe"],
            reported=tuple(config["reported"]),
            until=config.get("until"),
            origin=config.get("origin"),
        )

    def step(self) -> dict[str, Any]:
        if self._job is not None:
            ray.get(self._board.submit.remote(self._job))
            self._job = None
        report: dict[str, Any] = ray.get(self._board.next_report.remote(self._trial_id))
        return {**report, "done": bool(report.get("done"))}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the executor writes checkpoints, the ledger knows the rest."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""
