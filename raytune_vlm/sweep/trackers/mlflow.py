"""MLflow: a run for the sweep, below it one for each trial.

Runs are found again by their tags, and metrics by the last step that a run has of them.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from raytune_vlm.sweep.trackers.base import Kind, SweepFacts, Tracker, metric_name

MOST_AT_ONCE = 1000
"""Metrics that MLflow takes in one call."""

MOST_PARAMETERS = 100
"""Parameters that it takes in one call."""

LONGEST_VALUE = 6000
"""Characters of a parameter's value."""

_SWEEP, _TRIAL = "raytune_vlm.sweep", "raytune_vlm.trial"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "infeasible": "FAILED"}


class Mlflow(Tracker):
    """Writes to MLFLOW_TRACKING_URI; where that is not set, to `mlflow.db` in the sweep folder."""

    def __init__(self, facts: SweepFacts) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of its tables
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._facts = facts
        own = f"sqlite:///{facts.folder / 'mlflow.db'}"
        self._is_own = "MLFLOW_TRACKING_URI" not in os.environ
        self._client = MlflowClient(own if self._is_own else os.environ["MLFLOW_TRACKING_URI"])
        self._experiment = self._find_experiment()
        self._runs = self._find_runs()
        self._last: dict[tuple[str, Kind], int] = {}
        """Trial and kind -> the last step that its run has."""
        self._waiting: dict[str, list[list[Metric]]] = defaultdict(list)
        """Run -> rows of metrics that were not sent yet."""
        self._parent = self._sweep_run()

    def start(self, trial_id: str, recipe: Mapping[str, Any], when: float) -> None:
        run = self._runs.get(trial_id)
        if run is not None:
            self._last[trial_id, "train"] = self._last_step(run, metric_name("train", "loss"))
            self._last[trial_id, "select"] = self._last_step(run, self._facts.score_names[0])
            return
        tags = {
            _SWEEP: self._facts.sweep_id,
            _TRIAL: trial_id,
            "mlflow.parentRunId": self._parent.info.run_id,
            "mlflow.source.name": "raytune-vlm",
        }
        run = self._client.create_run(self._experiment, _ms(when), tags, trial_id)
        self._runs[trial_id] = run
        self._client.log_batch(run.info.run_id, params=_params(recipe))

    def log(
        self, trial_id: str, kind: Kind, step: int, values: Mapping[str, float], when: float
    ) -> None:
        if step > self._last.get((trial_id, kind), -1):
            self._last[trial_id, kind] = step
            row = [Metric(name, value, _ms(when), step) for name, value in values.items()]
            self._waiting[self._runs[trial_id].info.run_id].append(row)

    def end(self, trial_id: str, status: str, message: str | None, when: float) -> None:
        run_id = self._runs[trial_id].info.run_id
        self._send(run_id)
        self._client.set_tag(run_id, "raytune_vlm.status", status)
        if message:
            self._client.set_tag(run_id, "mlflow.note.content", message)
        self._client.set_terminated(run_id, _STATUS[status], _ms(when))

    def decide(self, values: Mapping[str, float], winner: str, when: float) -> None:
        run_id = self._parent.info.run_id
        metrics = [Metric(name, value, _ms(when), 0) for name, value in values.items()]
        self._client.log_batch(run_id, metrics, tags=[RunTag("raytune_vlm.winner", winner)])
        self._client.set_terminated(run_id, "FINISHED", _ms(when))

    def flush(self) -> None:
        for run_id in list(self._waiting):
            self._send(run_id)

    def close(self) -> None:
        self.flush()

    def _send(self, run_id: str) -> None:
        """Send what waits for a run; a row goes as a whole, so that its last step is known."""
        batch: list[Metric] = []
        for row in self._waiting.pop(run_id, []):
            if len(batch) + len(row) > MOST_AT_ONCE:
                self._client.log_batch(run_id, batch)
                batch = []
            batch += row
        if batch:
            self._client.log_batch(run_id, batch)

    def _find_experiment(self) -> str:
        name = self._facts.experiment.name
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        place = str(self._facts.folder / "mlflow-artifacts") if self._is_own else None
        return str(self._client.create_experiment(name, place))

    def _find_runs(self) -> dict[str, Run]:
        """Trial -> run, of those that an earlier life of the sweep made; "": the sweep's own."""
        found: dict[str, Run] = {}
        token: str | None = ""
        while token is not None:
            page = self._client.search_runs(
                [self._experiment],
                f"tags.`{_SWEEP}` = '{self._facts.sweep_id}'",
                page_token=token or None,
            )
            found |= {run.data.tags.get(_TRIAL, ""): run for run in page}
            token = page.token or None
        return found

    def _sweep_run(self) -> Run:
        if "" in self._runs:
            return self._runs[""]
        facts = self._facts
        tags = {_SWEEP: facts.sweep_id, "mlflow.source.name": "raytune-vlm"}
        run = self._client.create_run(
            self._experiment, _ms(facts.began), tags, facts.experiment.name
        )
        params = _params(facts.settings)
        for first in range(0, len(params), MOST_PARAMETERS):
            self._client.log_batch(run.info.run_id, params=params[first : first + MOST_PARAMETERS])
        return run

    def _last_step(self, run: Run, metric: str) -> int:
        if metric not in run.data.metrics:
            return -1
        history: Sequence[Metric] = self._client.get_metric_history(run.info.run_id, metric)
        return max(entry.step for entry in history)


def _params(values: Mapping[str, Any]) -> list[Param]:
    texts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }
    return [Param(key, text[:LONGEST_VALUE]) for key, text in texts.items()]


def _ms(when: float) -> int:
    return round(1000 * when)
