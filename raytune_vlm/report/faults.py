"""What went wrong and what was done about it: failed trials, notes, damage, resumed sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from raytune_vlm.report.loading import SweepView


@dataclass(frozen=True)
class Fault:
    """One thing that a reader of the results should know of."""

    time: str
    trial_id: str
    kind: str
    message: str


def faults(view: SweepView) -> list[Fault]:
    """From the ledger in its order; then what the records say of trials that it does not name."""
    found = []
    reasons = {trial.trial_id: trial.record.failure for trial in view.trials}
    for event in view.ledger:
        kind = _kind(event)
        if kind:
            when = ""
            if "time" in event:
                when = f"{datetime.fromtimestamp(float(event['time']), UTC):%Y-%m-%d %H:%M:%S}"
            reason = reasons.get(event.get("trial_id", "")) if kind == "failed" else None
            text = str(event.get("message") or event.get("kind") or reason or "")
            found.append(Fault(when, str(event.get("trial_id") or ""), kind, text))
    told = {(fault.trial_id, fault.message) for fault in found}
    failed = {fault.trial_id for fault in found if fault.kind == "failed"}
    for trial in view.trials:
        record = trial.record
        if record.status == "failed" and trial.trial_id not in failed:
            found.append(Fault("", trial.trial_id, "failed", record.failure or ""))
        notes = [note for note in record.notes if (trial.trial_id, note) not in told]
        found += [Fault("", trial.trial_id, "note", note) for note in notes]
        if record.micro_batch:
            text = ", ".join(f"{key} {value}" for key, value in record.micro_batch.items())
            found.append(Fault("", trial.trial_id, "micro-batch", text))
    return found


def _kind(event: dict[str, object]) -> str:
    """What an event of the ledger is to a reader; empty for one that went as planned."""
    kind = event.get("event")
    if kind in ("failed", "infeasible"):
        return str(kind)
    if kind == "noted":
        return "note"
    if kind == "resumed":
        return "resumed"
    if kind == "closed":
        return "closed early"
    return ""
