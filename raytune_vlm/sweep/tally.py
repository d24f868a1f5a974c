"""What the gauges of a sweep say, counted from its ledger, its scores and its data's manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.records import BASE_TRIAL, DataManifest, Scores, SweepFolder, read_json
from raytune_vlm.sweep.budget import held_seconds

STATES = ("waiting", "running", "paused", "finished", "stopped", "failed", "infeasible")
"""What a trial can be, in this order in its life."""

Figure = tuple[str, dict[str, str], float]
"""Name of a gauge, tags, value."""

_BY_EVENT = {
    "proposed": "waiting",
    "started": "running",
    "paused": "paused",
    "promoted": "waiting",
    **{name: name for name in STATES[3:]},
}


@dataclass
class Tally:
    """Told the events of a ledger in their order; unknown ones are passed over."""

    experiment: ExperimentConfig
    folder: SweepFolder
    states: dict[str, str] = field(default_factory=dict)
    """Trial -> one of STATES."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """Trial -> its newest scores on `select`."""
    rungs: Counter[int] = field(default_factory=Counter)
    """Step -> trials that were scored there."""
    failures: Counter[str] = field(default_factory=Counter)
    """Kind -> trials that failed of it."""
    num_resumed: int = 0
    best: Scores | None = None
    _events: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, event: Mapping[str, Any]) -> None:
        """Count one event."""
        kind, trial_id = str(event["event"]), str(event.get("trial_id"))
        self._events.append(event)
        self.num_resumed += kind == "resumed"
        if kind in _BY_EVENT:
            self.states[trial_id] = _BY_EVENT[kind]
        if kind == "control" and event["accepted"] and "clone" in event:
            self.states[event["clone"]["trial_id"]] = "waiting"
        for entry in event.get("exploits", ()):
            self.states[entry["clone"]["trial_id"]] = "paused"
        if kind == "failed":
            self.failures[str(event.get("message") or "error").partition(":")[0]] += 1
        if kind == "scored":
            self._scored(trial_id, int(event["step"]))

    def _scored(self, trial_id: str, step: int) -> None:
        self.rungs[step] += 1
        found = self._read(trial_id, step)
        if found is None:
            return
        self.scores[trial_id] = found
        metric, share = self.experiment.metric, self.experiment.select_share
        sign = 1 if self.experiment.mode == "max" else -1
        # Only scores on equal parts of `select` compare; those on larger ones count for more.
        rank = (share(step), sign * found.metrics[metric].value)
        best = self.best
        if best is None or rank > (share(best.step), sign * best.metrics[metric].value):
            self.best = found

    def _read(self, trial_id: str, step: int) -> Scores | None:
        file = self.folder.trial(trial_id).evaluation("select", step) / "scores.json"
        return Scores.from_json(read_json(file)) if file.exists() else None

    def held_seconds(self, now: float) -> float:
        """Seconds over all lives of the sweep; see `budget.held_seconds`."""
        return held_seconds(self._events, now)

    def num_ended(self) -> int:
        """Trials that were trained and have ended."""
        return sum(state in STATES[3:6] for state in self.states.values())

    def figures(self) -> Iterator[Figure]:
        """What the ledger and the scores say."""
        counts = Counter(self.states.values())
        for state in STATES:
            yield "trials", {"state": state}, counts[state]
        yield "trials_planned", {}, self.experiment.sweep.num_trials
        for step in self.experiment.rungs:
            yield "rung_trials", {"step": f"{step:06d}"}, self.rungs[step]
        for kind, number in self.failures.items():
            yield "failures", {"kind": kind}, number
        yield "resumes", {}, self.num_resumed
        yield from self._score_figures()

    def _score_figures(self) -> Iterator[Figure]:
        base = self._read(BASE_TRIAL, 0)
        for name, estimate in (base.metrics if base else {}).items():
            yield "base_score", {"metric": name}, estimate.value
        for name, estimate in (self.best.metrics if self.best else {}).items():
            yield "best_score", {"metric": name}, estimate.value
            yield "best_score_lower", {"metric": name}, estimate.lower
            yield "best_score_upper", {"metric": name}, estimate.upper
        for trial_id, scores in self.scores.items():
            for name, estimate in scores.metrics.items():
                yield "trial_score", {"trial_id": trial_id, "metric": name}, estimate.value
            yield "trial_step", {"trial_id": trial_id}, scores.step
            bad = {
                "unparsed": scores.parse_failure_rate,
                "empty": scores.empty_rate,
                "truncated": scores.truncation_rate,
            }
            for fault, share in bad.items():
                yield "trial_bad_answers", {"trial_id": trial_id, "fault": fault}, share


def data_figures(data: DataManifest) -> Iterator[Figure]:
    """What became of the samples; the same for the whole sweep."""
    for split, entry in data.splits.items():
        fates = {
            "used": entry.num_used,
            "quarantined": entry.num_quarantined,
            "over_long": entry.num_dropped_over_long,
            "duplicate": entry.num_duplicates,
        }
        for fate, number in fates.items():
            yield "split_samples", {"split": split, "fate": fate}, number
        yield "sample_tokens_mean", {"split": split}, entry.mean_length
        yield "sample_tokens_max", {"split": split}, entry.max_length
    for reason, number in data.quarantine_reasons.items():
        yield "quarantined_samples", {"reason": reason}, number


def executor_figures(status: Mapping[str, Mapping[str, Any]]) -> Iterator[Figure]:
    """How far the jobs are, as the executors told the board."""
    for _, entry in sorted(status.items()):
        tags = {"executor": str(entry["executor"]), "trial_id": str(entry.get("trial_id"))}
        if entry.get("asked"):
            yield "prompts_asked", tags, entry["asked"]
            yield "prompts_answered", tags, entry["answered"]
            if entry.get("seconds_left") is not None:
                yield "evaluation_seconds_left", tags, entry["seconds_left"]
