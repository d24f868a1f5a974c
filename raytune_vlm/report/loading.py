"""Read a sweep folder into one view that the page, the plots and the model card are drawn from.

A report must not fail where a sweep did: what is missing stays empty, what cannot be read becomes
a note on the page. Only a folder without `experiment.json` is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from raytune_vlm.config.evaluation import METRIC_MODES
from raytune_vlm.errors import DataError
from raytune_vlm.records import (
    BASE_TRIAL,
    DataManifest,
    MetricEstimate,
    PairedTest,
    Quarantined,
    Scores,
    Split,
    SweepFolder,
    SweepResult,
    TrialRecord,
    as_record,
    read_json,
    read_json_lines,
)
from raytune_vlm.report.events import by_hand, clone_origins, lineages, read_events
from raytune_vlm.visible import one_line

T = TypeVar("T")


UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError)
"""What reading a file raises that says something else than it should."""


@dataclass(frozen=True)
class TrialView:
    """One trial with all that was written about it."""

    trial_id: str
    record: TrialRecord
    select: tuple[Scores, ...] = ()
    """Scores on `select`, by step."""
    report: tuple[Scores, ...] = ()
    """Scores on `report`, by step; only the chosen trials have one."""
    logs: tuple[dict[str, Any], ...] = ()
    """Lines of `metrics.jsonl`, one a step; of a step that was repeated, the last."""

    def estimates(self, metric: str) -> list[tuple[int, MetricEstimate]]:
        """(step, estimate) of a metric on `select`, by step; without those that are not numbers."""
        found = [(s.step, s.metrics[metric]) for s in self.select if metric in s.metrics]
        return [(step, estimate) for step, estimate in found if math.isfinite(estimate.value)]

    @property
    def num_select(self) -> int:
        """The most samples of `select` that this trial was scored on at once."""
        return max((scores.num_samples for scores in self.select), default=0)


@dataclass(frozen=True)
class SweepView:
    """A sweep folder, read."""

    folder: SweepFolder
    experiment: dict[str, Any]
    fingerprint: str
    versions: dict[str, Any]
    command: str
    metric: str
    mode: Literal["max", "min"]
    result: SweepResult | None
    trials: tuple[TrialView, ...]
    base: TrialView | None
    manifest: DataManifest | None
    quarantined: tuple[Quarantined, ...]
    ledger: tuple[dict[str, Any], ...]
    like_train: frozenset[str] = frozenset()
    """Samples of `report` that are much like one of `train`."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sample of `report` -> `source` and `pixels`; empty in folders of earlier versions."""
    notes: tuple[str, ...] = field(default=())
    """What could not be read, for people."""

    @property
    def name(self) -> str:
        return str(self.experiment.get("name", self.folder.root.name))

    @property
    def model(self) -> str:
        return str(lookup(self.experiment, "model.name", "unknown model"))

    @property
    def confidence(self) -> float:
        found = lookup(self.experiment, "evaluation.confidence")
        return found if isinstance(found, float) and 0 < found < 1 else 0.95

    @property
    def search_space(self) -> dict[str, Any]:
        space = lookup(self.experiment, "sweep.search_space", {})
        entries = space.items() if isinstance(space, dict) else ()
        return {key: entry for key, entry in entries if isinstance(entry, dict)}

    @property
    def varied_keys(self) -> list[str]:
        """Every dotted key that the search varies, in the order of the experiment file."""
        recipes = (key for trial in self.trials for key in trial.record.recipe)
        return list(dict.fromkeys([*self.search_space, *recipes]))

    @property
    def seconds(self) -> float:
        """Wall time: of the sweep if it has ended, else from the first to the last event."""
        if self.result is not None:
            return self.result.seconds
        times = [float(event["time"]) for event in self.ledger if "time" in event]
        return max(times) - min(times) if times else 0.0

    def trial(self, trial_id: str | None) -> TrialView | None:
        """The trial of that id (also `base`), if the folder has it."""
        if trial_id == BASE_TRIAL:
            return self.base
        return next((trial for trial in self.trials if trial.trial_id == trial_id), None)

    @property
    def num_report_touches(self) -> int:
        """How often a checkpoint was scored on `report` in the life of the folder."""
        touched = sum(event.get("event") == "touched" for event in self.ledger)
        return max(touched, self.result.num_report_touches if self.result else 0)

    @property
    def infeasible(self) -> dict[str, str]:
        """Trial that broke a constraint, and may not win -> which."""
        return {
            event["trial_id"]: event.get("infeasible") or event["message"]
            for event in self.ledger
            if event.get("infeasible") or event.get("event") == "infeasible"
        }

    @property
    def clone_origins(self) -> dict[str, dict[str, Any]]:
        """See `events.clone_origins`."""
        return clone_origins(self.ledger)

    @property
    def lineages(self) -> dict[str, tuple[str, ...]]:
        """See `events.lineages`."""
        return lineages(self.ledger)

    @property
    def by_hand(self) -> dict[str, tuple[str, ...]]:
        """See `events.by_hand`."""
        return by_hand(self.ledger)

    @property
    def num_planned(self) -> int | None:
        """Trials that the sweep was to have, as last set by hand, and its clones so far."""
        planned = lookup(self.experiment, "sweep.num_trials", None)
        changed = [e["limits"] for e in self.ledger if e.get("limits")]
        planned = next(
            (row["num_trials"] for row in reversed(changed) if "num_trials" in row), planned
        )
        return planned + len(self.clone_origins) if isinstance(planned, int) else None

    @property
    def winner(self) -> TrialView | None:
        return self.trial(self.result.winner) if self.result else None

    @property
    def default_id(self) -> str | None:
        return self.result.default if self.result else None

    def best(
        self, trial: TrialView, metric: str | None = None
    ) -> tuple[int, MetricEstimate] | None:
        """The best rung of a trial on `select`: (step, estimate).

        Rungs that were scored on fewer samples than others of the trial do not compare.
        """
        name = metric or self.metric
        sign = -1.0 if self.mode_of(name) == "max" else 1.0
        whole = {scores.step for scores in trial.select if scores.num_samples == trial.num_select}
        found = [pair for pair in trial.estimates(name) if pair[0] in whole]
        return min(found, key=lambda pair: sign * pair[1].value) if found else None

    def mode_of(self, metric: str) -> str:
        return self.mode if metric == self.metric else METRIC_MODES.get(metric, "max")

    @property
    def metrics(self) -> list[str]:
        """The deciding metric, then every other one that was computed."""
        scored = [t for t in (*self.trials, self.base) if t is not None]
        names = (name for t in scored for s in (*t.select, *t.report) for name in s.metrics)
        return list(dict.fromkeys([self.metric, *names]))

    def role_of(self, name: str) -> str:
        """The trial id behind a role (`winner`); any other name is a trial id already."""
        return self.result.report.get(name, name) if self.result else name

    def report_scores(self, role: str) -> Scores | None:
        """The scores of a role (`base`, `default`, `winner`) on the untouched split."""
        if self.result is None or role not in self.result.report:
            return None
        trial = self.trial(self.result.report[role])
        if trial is None or not trial.report:
            return None
        if trial.trial_id == self.result.winner:
            wanted = [s for s in trial.report if s.step == self.result.winner_step]
            return wanted[-1] if wanted else trial.report[-1]
        return trial.report[-1]

    def is_on_report(self, test: PairedTest) -> bool:
        """Whether both sides of a paired test were scored on `report` (else it is on `select`)."""
        scored = set(self.result.report.values()) if self.result else set()
        return {self.role_of(test.first), self.role_of(test.second)} <= scored

    def against(self, trial_id: str | None) -> PairedTest | None:
        """The paired test winner minus another trial in the deciding metric, if it was made."""
        if self.result is None:
            return None
        for test in self.result.paired:
            sides = (self.role_of(test.first), self.role_of(test.second))
            if test.metric != self.metric or trial_id not in sides:
                continue
            if sides == (self.result.winner, trial_id):
                return test
            if sides == (trial_id, self.result.winner):
                return reverse(test)
        return None


def reverse(test: PairedTest) -> PairedTest:
    """The same comparison told the other way round."""
    return replace(
        test,
        first=test.second,
        second=test.first,
        difference=-test.difference,
        lower=-test.upper,
        upper=-test.lower,
    )


def lookup(mapping: Any, dotted: str, default: Any = None) -> Any:
    """The value at a dotted key of nested mappings, or the default."""
    for part in dotted.split("."):
        if not isinstance(mapping, dict) or part not in mapping:
            return default
        mapping = mapping[part]
    return mapping


def load_view(root: Path | str) -> SweepView:
    """Read everything that a sweep folder holds by now.

    Raises
    ------
    DataError
        If the folder has no readable `experiment.json`.
    """
    folder = SweepFolder(root)
    if not folder.experiment_file.is_file():
        raise DataError(f"{folder.root} is not a sweep folder: no experiment.json")
    header = _header(folder.experiment_file)
    reader = _Reader(folder.root)
    experiment = header["experiment"]
    result = reader.read(folder.result_file, lambda file: SweepResult.from_json(read_json(file)))
    metric, mode = _decision(experiment, result)
    trials = [_load_trial(reader, folder, name) for name in folder.trial_ids()]
    return SweepView(
        folder=folder,
        experiment=experiment,
        fingerprint=str(header.get("fingerprint", "")),
        versions=header["versions"],
        command=str(header.get("command", "")),
        metric=metric,
        mode=mode,
        result=result,
        trials=tuple(sorted((t for t in trials if t), key=lambda t: t.record.number)),
        base=_load_base(reader, folder),
        manifest=reader.read(
            folder.manifest_file, lambda file: DataManifest.from_json(read_json(file))
        ),
        quarantined=tuple(
            reader.read(folder.quarantine_file, lambda f: _rows(f, Quarantined)) or ()
        ),
        ledger=tuple(reader.read(folder.ledger_file, read_events) or ()),
        like_train=frozenset(
            reader.read(folder.overlap_file, lambda _: folder.overlapping("report")) or ()
        ),
        facts=reader.read(folder.facts_file, lambda _: folder.facts()) or {},
        notes=tuple(reader.notes),
    )


def _header(file: Path) -> dict[str, Any]:
    """What `experiment.json` holds; raises DataError unless it is as `sweep` writes it."""
    try:
        header = read_json(file)
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(header.get("experiment", {}), dict):
        raise DataError(f"{file} holds no experiment")
    versions = header.get("versions")
    return {
        **header,
        "experiment": header.get("experiment", {}),
        "versions": versions if isinstance(versions, dict) else {},
    }


class _Reader:
    """Reads files and remembers those that it could not make sense of."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []

    def read(self, file: Path, parse: Callable[[Path], T]) -> T | None:
        """The parsed file; None if there is none or if it cannot be parsed (then noted)."""
        if not file.is_file():
            if file.exists():
                self._note(file, "is no regular file")
            return None
        try:
            return parse(file)
        except UNREADABLE as error:
            self._note(file, f"cannot be read: {type(error).__name__}: {error!s:.300}")
            return None

    def _note(self, file: Path, what: str) -> None:
        self.notes.append(one_line(f"{file.relative_to(self.root)} {what}"))

    def scores(self, folder: SweepFolder, trial_id: str, split: Split) -> tuple[Scores, ...]:
        pattern = f"trials/{trial_id}/evaluations/{split}/step_*/scores.json"
        files = sorted(folder.root.glob(pattern))
        read = [self.read(file, lambda f: Scores.from_json(read_json(f))) for file in files]
        return tuple(sorted((s for s in read if s is not None), key=lambda s: s.step))


def _load_trial(reader: _Reader, folder: SweepFolder, trial_id: str) -> TrialView | None:
    paths = folder.trial(trial_id)
    record = reader.read(paths.record_file, lambda _: paths.record())
    if record is None:
        return None
    rows = reader.read(paths.metrics_file, read_json_lines) or []
    by_step = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return TrialView(
        trial_id=trial_id,
        record=record,
        select=reader.scores(folder, trial_id, "select"),
        report=reader.scores(folder, trial_id, "report"),
        logs=tuple(by_step[step] for step in sorted(by_step)),
    )


def _load_base(reader: _Reader, folder: SweepFolder) -> TrialView | None:
    select = reader.scores(folder, BASE_TRIAL, "select")
    report = reader.scores(folder, BASE_TRIAL, "report")
    if not select and not report:
        return None
    record = TrialRecord(BASE_TRIAL, -1, {}, "finished")
    return TrialView(BASE_TRIAL, record, select, report)


def _decision(
    experiment: dict[str, Any], result: SweepResult | None
) -> tuple[str, Literal["max", "min"]]:
    """The deciding metric and its direction, known from the experiment before the end."""
    if result is not None:
        return result.metric, result.mode
    lists = [lookup(experiment, key) for key in ("sweep.objectives", "evaluation.metrics")]
    objective, listed = (found[0] if isinstance(found, list) and found else "" for found in lists)
    named = (lookup(objective, "metric"), lookup(experiment, "sweep.metric"), listed)
    known = (name for name in named if isinstance(name, str) and name)
    metric = next(known, "exact_match@strip")
    return metric, METRIC_MODES.get(metric, "max")


def _rows(file: Path, kind: type[T]) -> list[T]:
    return [as_record(kind, row) for row in read_json_lines(file)]
