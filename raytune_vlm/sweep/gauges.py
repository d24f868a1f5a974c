"""Prometheus gauges through `ray.util.metrics`; Ray puts `ray_` in front of their names.

Ray forgets a gauge that was not set for 20 seconds, also while its process lives: whoever holds one
sets it again and again, and lets go of it to make it vanish.
"""

from __future__ import annotations

import threading
import time
from dataclasses import fields
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "raytune_vlm_"
RENEW_EVERY_S = 8.0

_BOARD = {
    "executors_alive": "Executors that take jobs.",
    "trials_queued": "Trials that wait for an executor.",
    "trials_running": "Trials that an executor holds.",
    "trials_ended": "Trials that ended in this life of the run.",
}


class TrialGauges:
    """The last logged steps of the trials that an executor trains, one gauge a number.

    Every numeric field of `train.run.StepMetrics`, tagged with `trial_id` and `executor`.
    """

    def __init__(self, executor: str) -> None:
        self._executor = executor
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
            tags = {"trial_id": trial_id, "executor": self._executor}
            for name, value in values.items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        f"{PREFIX}{name}",
                        f"{name.replace('_', ' ')} of the last logged step of a trial.",
                        ("trial_id", "executor"),
                    )
                self._gauges[name].set(value, tags)
        self._set_at = time.monotonic()


class BoardGauges:
    """What the board counts, tagged with the sweep's name; set from the driver."""

    def __init__(self, sweep: str) -> None:
        self._tags = {"sweep": sweep}
        self._gauges = {
            name: Gauge(f"{PREFIX}{name}", text, ("sweep",)) for name, text in _BOARD.items()
        }

    def set(self, counts: dict[str, int]) -> None:
        """Show the counts; again at least every few seconds."""
        for name, count in counts.items():
            self._gauges[name].set(count, self._tags)
