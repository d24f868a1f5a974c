"""What came of a sweep that a fault struck, compared with the undisturbed one of the same seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_vlm.records import SweepFolder, read_json, read_json_lines
from tests.faults.small import TRAIN_SAMPLES

ENDINGS = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Outcome:
    """Everything of a sweep folder that must not depend on what happened on the way."""

    result: dict[str, Any]
    metrics: dict[str, Any]
    """Trial -> losses and gradient norms step by step, scores rung by rung."""
    weights: dict[str, str]
    """Adapter and optimizer of every kept checkpoint, and the winner's adapter -> their hash."""
    samples: dict[str, list[Counter[str]]]
    """Trial -> the multiset of samples of each epoch."""
    proposed: dict[str, dict[str, Any]]
    doubled: list[str]
    """Trials that were proposed or ended more than once."""


def outcome(root: Path) -> Outcome:
    """Read a sweep folder."""
    folder = SweepFolder(root)
    events = read_json_lines(folder.ledger_file)
    proposed = {row["trial_id"]: row["recipe"] for row in events if row["event"] == "proposed"}
    counts = Counter(
        (row["event"] == "proposed", row["trial_id"])
        for row in events
        if row["event"] in ("proposed", *ENDINGS)
    )
    metrics, samples = {}, {}
    weights = {"best": _hash(folder.best / "adapter_model.safetensors")}
    for trial_id in trials_of(root):
        trial = folder.trial(trial_id)
        rows = read_json_lines(trial.metrics_file)
        metrics[trial_id] = {
            "steps": [(row["step"], row["loss"], row["grad_norm"]) for row in rows],
            "scores": {
                f"{split}/{entry.step}": {name: x.value for name, x in entry.metrics.items()}
                for split in ("select", "report")
                for entry in trial.scores(split)
            },
        }
        drawn = [
            name for row in read_json_lines(trial.samples / "rank_0.jsonl") for name in row["ids"]
        ]
        starts = range(0, len(drawn), TRAIN_SAMPLES)
        samples[trial_id] = [Counter(drawn[start : start + TRAIN_SAMPLES]) for start in starts]
        for name in ("adapter_model", "optimizer"):
            for file in trial.checkpoints.glob(f"*/{name}.safetensors"):
                weights[f"{trial_id}/{file.parent.name}/{name}"] = _hash(file)
    result = read_json(folder.result_file)
    return Outcome(
        result={name: value for name, value in result.items() if name != "seconds"},
        metrics=metrics,
        weights=weights,
        samples=samples,
        proposed=proposed,
        doubled=sorted(trial_id for (_, trial_id), count in counts.items() if count > 1),
    )


def trials_of(root: Path) -> list[str]:
    """Trials and replicates that have a log."""
    base = root / "trials"
    return sorted(str(file.parent.relative_to(base)) for file in base.rglob("metrics.jsonl"))


@dataclass
class Verdict:
    """A row of the table."""

    fault: str
    where: str
    ended: str
    winner: str = "-"
    metrics: str = "-"
    weights: str = "-"
    samples: str = "-"
    lost: str = "-"
    doubled: str = "-"
    repeated: str = "-"
    next_step: str = "-"
    problems: list[str] = field(default_factory=list)
    """What is not as promised; empty is good."""

    def cells(self) -> list[str]:
        """The row, without its problems."""
        return [str(value) for name, value in vars(self).items() if name != "problems"]


def compare(verdict: Verdict, whole: Path, struck: Path, *, without: str | None) -> None:
    """Fill in a verdict; what differs is a problem.

    `without`: a trial that the fault itself changes.
    """
    first, second = outcome(whole), outcome(struck)
    if without is not None:
        first, second = _without(first, without), _without(second, without)
    # Who was struck may have kept one more or one less of the older checkpoints.
    both = first.weights.keys() & second.weights.keys()
    differences = {
        "winner": _difference(first.result, second.result),
        "metrics": _difference(first.metrics, second.metrics),
        "weights": _difference(*({key: x.weights[key] for key in both} for x in (first, second))),
        "samples": _difference(first.samples, second.samples),
    }
    for name, place in differences.items():
        setattr(verdict, name, "same" if place is None else "differs")
        if place is not None:
            verdict.problems.append(f"{name}: differs at {place}")
    lost = sorted(first.proposed.keys() - second.proposed.keys())
    if not lost and first.proposed != second.proposed:
        verdict.problems.append("other recipes were proposed")
    verdict.lost, verdict.doubled = str(len(lost)), str(len(second.doubled))
    if lost or second.doubled:
        verdict.problems.append(f"lost: {lost}, doubled: {second.doubled}")


def steps_repeated(trace: list[dict[str, Any]]) -> int:
    """Steps that were done more than once, over all lives."""
    done = Counter((row["trial"], row["step"]) for row in trace if row.get("point") == "step")
    return sum(count - 1 for count in done.values())


def seconds_to_next_step(trace: list[dict[str, Any]]) -> float | None:
    """From the first strike to the first step that had not been done before; None: no step left.

    Where other processes go on, it is theirs: who was struck may do a step or two before it ends.
    """
    done: set[tuple[str, int]] = set()
    known: set[int] = set()
    began, first = None, None
    for row in trace:
        if "struck" in row:
            began = began or row["time"]
        elif row["point"] == "step":
            step = (row["trial"], row["step"])
            if began is None:
                known.add(row["pid"])
            elif step not in done:
                first = first or float(row["time"] - began)
                if row["pid"] not in known:
                    return float(row["time"] - began)
            done.add(step)
    return first


def _without(found: Outcome, trial_id: str) -> Outcome:
    def others(known: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in known.items() if name.split("/")[0] != trial_id}

    # The selection bias is estimated over all trials.
    of_all = {"corrected", "indistinguishable", "against_base"}
    return Outcome(
        {name: value for name, value in found.result.items() if name not in of_all},
        others(found.metrics),
        others(found.weights),
        others(found.samples),
        found.proposed,
        [name for name in found.doubled if name != trial_id],
    )


def _difference(first: Any, second: Any, place: str = "") -> str | None:
    """Where two trees differ first; None if they do not."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted({*first, *second}):
            if key not in first or key not in second:
                return f"{place}/{key} (only one has it)"
            if (found := _difference(first[key], second[key], f"{place}/{key}")) is not None:
                return found
        return None
    return None if first == second else (place or "/")


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
