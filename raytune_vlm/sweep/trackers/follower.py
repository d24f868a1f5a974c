"""Follows a sweep's folder and tells its trackers; a thread of the driver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import first_line
from raytune_vlm.monitor import Say
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep.beside import Beside
from raytune_vlm.sweep.ledger_tail import LedgerTail
from raytune_vlm.sweep.trackers import open_tracker
from raytune_vlm.sweep.trackers.base import SweepFacts, Tracker, metric_name

EVERY_S = 2.0
"""Pause between two looks."""

_ENDS = ("finished", "stopped", "failed", "infeasible")
_NO_FIGURES = ("step", "time")


class Follower(Beside):
    """Tells the trackers of `report.trackers` what the folder says; a context manager.

    A tracker that fails is told nothing more in this life of the sweep, which goes on.

    Parameters
    ----------
    folder
        The sweep folder; read only.
    say
        Tells a person something.
    """

    def __init__(self, folder: SweepFolder, experiment: ExperimentConfig, say: Say) -> None:
        super().__init__("trackers")
        self._folder, self._experiment, self._say = folder, experiment, say
        self._trackers: dict[str, Tracker] | None = None
        """None: not opened yet."""
        self._tail = LedgerTail(folder.ledger_file)
        self._last: dict[str, int] = {}
        """Open trial -> the last step of its `metrics.jsonl` that was told."""
        self._seen: dict[str, tuple[int, int]] = {}
        """Open trial -> size and time of change of that file when it was read."""

    def __enter__(self) -> Follower:
        return super().__enter__() if self._experiment.report.trackers else self

    def __exit__(self, *_: object) -> None:
        if self._experiment.report.trackers:
            super().__exit__()

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(EVERY_S)
            self.look()
        self._each(lambda tracker: tracker.close())

    def look(self) -> None:
        """Tell what is new since the last look."""
        for row in self._tail.new():
            if self._trackers is None:
                self._open(float(row["time"]))
            self._event(row)
        for trial_id in list(self._last):
            self._steps(trial_id)
        self._each(lambda tracker: tracker.flush())

    def _open(self, began: float) -> None:
        facts = SweepFacts(self._experiment, self._folder.root, began)
        self._trackers = {}
        for name in self._experiment.report.trackers:
            try:
                self._trackers[name] = open_tracker(name, facts)
            except Exception as error:
                self._lost(name, error)

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list((self._trackers or {}).items()):
            try:
                tell(tracker)
            except Exception as error:
                assert self._trackers is not None
                del self._trackers[name]
                self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        self._say(
            f"WARNING: tracker {name} failed and is told nothing more ({first_line(error)}); the "
            "sweep goes on, and `raytune-vlm resume` tells it what it missed"
        )

    def _event(self, row: dict[str, Any]) -> None:
        event, when, trial_id = row["event"], float(row["time"]), str(row.get("trial_id"))
        if event == "proposed":
            self._start(trial_id, row["recipe"], when)
        elif event == "control" and row["accepted"] and "clone" in row:
            self._start(row["clone"]["trial_id"], row["clone"]["recipe"], when)
        elif event == "exploited":
            for clone in (entry["clone"] for entry in row["exploits"]):
                self._start(clone["trial_id"], clone["recipe"], when)
        elif event == "scored" and trial_id in self._last:
            self._steps(trial_id)
            scores = {metric_name("select", name): x for name, x in row["scores"].items()}
            step = int(row["step"])
            self._each(lambda tracker: tracker.log(trial_id, "select", step, scores, when))
        elif event in _ENDS and trial_id in self._last:
            self._steps(trial_id)
            del self._last[trial_id]
            message = row.get("message")
            self._each(lambda tracker: tracker.end(trial_id, event, message, when))
        elif event == "decided":
            values = self._decision()
            self._each(lambda tracker: tracker.decide(values, trial_id, when))

    def _start(self, trial_id: str, recipe: dict[str, Any], when: float) -> None:
        self._last[trial_id] = 0
        self._each(lambda tracker: tracker.start(trial_id, recipe, when))

    def _steps(self, trial_id: str) -> None:
        """The new lines of a trial's `metrics.jsonl`; those that a restart repeats are known."""
        file: Path = self._folder.trial(trial_id).metrics_file
        try:
            state = file.stat()
        except FileNotFoundError:
            return
        seen = (state.st_size, state.st_mtime_ns)
        if self._seen.get(trial_id) == seen:
            return
        self._seen[trial_id] = seen
        for row in read_json_lines(file):
            if row["step"] > self._last[trial_id]:
                self._last[trial_id] = row["step"]
                self._log_step(trial_id, row)

    def _log_step(self, trial_id: str, row: dict[str, Any]) -> None:
        values = {
            metric_name("train", name): float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in _NO_FIGURES
        }
        step, when = int(row["step"]), float(row["time"])
        self._each(lambda tracker: tracker.log(trial_id, "train", step, values, when))

    def _decision(self) -> dict[str, float]:
        """What the decision says of the winner on `select`, and of all roles on `report`."""
        result = self._folder.result()
        assert result is not None, "decided, but there is no result.json"
        values = {"winner/naive": result.naive}
        if result.corrected is not None:
            values |= {
                "winner/corrected": result.corrected.value,
                "winner/corrected_lower": result.corrected.lower,
                "winner/corrected_upper": result.corrected.upper,
            }
        for role, trial_id in result.report.items():
            for scores in self._folder.trial(trial_id).scores("report")[-1:]:
                for name, estimate in scores.metrics.items():
                    values[metric_name(f"report/{role}", name)] = estimate.value
        return values
