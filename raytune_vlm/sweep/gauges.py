"""Prometheus gauges through `ray.util.metrics`; Ray puts `ray_` in front of their names.

Ray forgets a gauge that was not set for 20 seconds, also while its process lives: whoever holds one
sets it again and again, and lets go of it to make it vanish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "raytune_vlm_"
RENEW_EVERY_S = 8.0

OF_TRIALS = ("trial_id", "executor")
"""Labels besides `sweep` of the gauges that an executor sets, one for each number of a line of
metrics.jsonl."""

OF_SWEEPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "executors_alive": ("Executors that take jobs.", ()),
    "slots_in_use": ("Jobs that executors hold.", ()),
    "trials_queued": ("Trials that wait for an executor.", ()),
    "trials_running": ("Trials that an executor holds.", ()),
    "trials_ended": ("Trials that ended in this life of the run.", ()),
    "recoveries": ("Jobs handed out again after a death, a hang or a node that left.", ()),
    "resumes": ("Lives of the sweep after the first.", ()),
    "trials": ("Trials by state.", ("state",)),
    "trials_planned": ("sweep.num_trials.", ()),
    "progress": ("Share of all steps that is done; an ended trial counts whole.", ()),
    "seconds_left": ("Seconds that the rest takes at the pace of this life.", ()),
    "held_seconds": ("Seconds over all lives of the sweep.", ()),
    "cost": ("What the executors cost so far, at sweep.cost_per_*_hour.", ()),
    "cost_left": ("What the rest costs at the pace of this life.", ()),
    "budget_used": ("Share of sweep.max_* that is used up.", ("limit",)),
    "rung_trials": ("Trials that were scored at a rung.", ("step",)),
    "failures": ("Trials that failed, by kind.", ("kind",)),
    "base_score": ("Of the untouched base model on select.", ("metric",)),
    "best_score": ("Of the best trial on select, at the rungs that compare.", ("metric",)),
    "best_score_lower": ("Lower end of its interval.", ("metric",)),
    "best_score_upper": ("Upper end of its interval.", ("metric",)),
    "trial_score": ("Of a trial on select where it was scored last.", ("trial_id", "metric")),
    "trial_step": ("Where a trial was scored last.", ("trial_id",)),
    "trial_bad_answers": (
        "Share of a trial's answers that are unparsed, empty or truncated.",
        ("trial_id", "fault"),
    ),
    "split_samples": ("Samples of a split and what became of them.", ("split", "fate")),
    "sample_tokens_mean": ("Mean length of a split's samples in tokens.", ("split",)),
    "sample_tokens_max": ("Longest sample of a split in tokens.", ("split",)),
    "quarantined_samples": ("Samples refused, by the first reason of its kind.", ("reason",)),
    "prompts_asked": ("Prompts of the evaluation that an executor is at.", OF_TRIALS),
    "prompts_answered": ("Those of them that are answered.", OF_TRIALS),
    "evaluation_seconds_left": ("Until that evaluation is done.", OF_TRIALS),
}
"""Name -> what it says and its labels besides `sweep`; set by the driver."""


class TrialGauges:
    """The last logged steps of the trials that an executor trains, one gauge a number.

    Every numeric field of `train.step_metrics.StepMetrics`, tagged with `sweep` and OF_TRIALS.
    """

    def __init__(self, sweep: str, executor: str) -> None:
        self._sweep, self._executor = sweep, executor
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, dict[str, float]] = {}
        """Trial -> its numbers by their names."""
        self._set_at = 0.0
        self._lock = threading.Lock()

    def set(self, trial_id: str, metrics: Any) -> None:
        """Show the numbers of a dataclass; what is no number or not known (None) is left out."""
        found = {field.name: getattr(metrics, field.name) for field in fields(metrics)}
        with self._lock:
            self._values[trial_id] = {
                name: float(value)
                for name, value in found.items()
                if isinstance(value, int | float)
            }
            self._show()

    def renew(self) -> None:
        """Set them again if that is due."""
        with self._lock:
            if self._values and time.monotonic() - self._set_at >= RENEW_EVERY_S:
                self._show()

    def drop(self, trial_id: str) -> None:
        """Let those of a trial vanish."""
        with self._lock:
            self._values.pop(trial_id, None)

    def _show(self) -> None:
        for trial_id, values in self._values.items():
            tags = {"sweep": self._sweep, "trial_id": trial_id, "executor": self._executor}
            for name, value in values.items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        f"{PREFIX}{name}",
                        f"{name.replace('_', ' ')} of the last logged step of a trial.",
                        ("sweep", *OF_TRIALS),
                    )
                self._gauges[name].set(value, tags)
        self._set_at = time.monotonic()


class SweepGauges:
    """The gauges of OF_SWEEPS, tagged with the sweep's name; set from the driver."""

    def __init__(self, sweep: str) -> None:
        self._sweep = sweep
        self._gauges: dict[str, Gauge] = {}

    def set(self, figures: Iterable[tuple[str, dict[str, str], float]]) -> None:
        """Show some of them: name, labels, value; again at least every few seconds."""
        for name, tags, value in figures:
            if name not in self._gauges:
                text, labels = OF_SWEEPS[name]
                self._gauges[name] = Gauge(f"{PREFIX}{name}", text, ("sweep", *labels))
            self._gauges[name].set(value, {"sweep": self._sweep, **tags})
