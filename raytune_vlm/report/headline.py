"""What a sweep found, in words and three numbers; says plainly when it found nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from raytune_vlm.records import BASE_TRIAL, MetricEstimate, PairedTest
from raytune_vlm.report import formatting
from raytune_vlm.report.lineage import lineage, schedule
from raytune_vlm.report.loading import SweepView, TrialView

Tone = Literal["good", "unclear", "bad", "running"]


@dataclass(frozen=True)
class Station:
    """One of base, default, winner on the untouched split, with its place on a common scale."""

    role: str
    trial_id: str
    estimate: MetricEstimate
    num_samples: int
    num_groups: int
    start: float = 0.0
    """Percent of the scale at which the interval starts, the value stands, the interval ends."""
    middle: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Headline:
    """The first screen of the report."""

    tone: Tone
    status: str
    verdict: str
    detail: str
    stations: list[Station]
    facts: list[tuple[str, str, str]]
    """(label, value, explanation)."""


def headline(view: SweepView) -> Headline:
    """The verdict with the numbers that it rests on."""
    tone, verdict, detail = _verdict(view)
    ended = [trial.record.status != "running" for trial in view.trials]
    is_single_run = not view.search_space and bool(ended) and all(ended)
    status = "finished" if view.result or is_single_run else "running"
    return Headline(tone, status, verdict, detail, _stations(view), _facts(view))


def tally(view: SweepView) -> str:
    """How many trials ended how: `9 finished, 4 stopped early, 1 failed`."""
    counts = Counter(trial.record.status for trial in view.trials)
    parts = [
        f"{counts['finished']} finished" if counts["finished"] else "",
        f"{counts['stopped']} stopped early" if counts["stopped"] else "",
        f"{counts['failed']} failed" if counts["failed"] else "",
        f"{counts['running']} {'never ended' if view.result else 'running'}"
        if counts["running"]
        else "",
    ]
    return ", ".join(filter(None, parts)) or "none started"


def clearly(test: PairedTest, mode: str) -> Tone:
    """Whether `first` is better than `second` beyond its interval."""
    lower, upper = (test.lower, test.upper) if mode == "max" else (-test.upper, -test.lower)
    if lower > 0:
        return "good"
    return "bad" if upper < 0 else "unclear"


def interval(lower: float, upper: float, form: str = "score") -> str:
    """`0.801 to 0.873`."""
    write = formatting.FILTERS[form]
    return f"{write(lower)} to {write(upper)}"


def _verdict(view: SweepView) -> tuple[Tone, str, str]:
    result = view.result
    if result is None:
        if not view.search_space:
            numbers = tally(view)
            return "running", "A single training run: nothing is compared.", f"Runs: {numbers}."
        of = f" of {view.num_planned} planned" if view.num_planned else ""
        started = f"{len(view.trials)}{of} trials so far: {tally(view)}."
        return "running", "The sweep is running: no winner has been chosen.", started
    test = view.against(BASE_TRIAL)
    if test is None:
        verdict = f"{result.winner} was chosen, without a paired test against the base model."
        return "unclear", verdict, "Whether it is better than the base model is not established."
    tone = clearly(test, view.mode)
    confidence = formatting.percent(view.confidence)
    numbers = (
        f"Paired difference in {test.metric} on {test.num_samples} samples of the untouched report "
        f"split: {formatting.signed(test.difference)} ({confidence} interval "
        f"{interval(test.lower, test.upper, 'signed')}, {formatting.p_value(test.p_value)}"
        f"{_adjusted(test)})"
    )
    if tone == "good":
        detail = f"{numbers}. {_against_default(view)}".rstrip()
        return tone, f"{result.winner} is clearly better than the base model.", detail
    if tone == "bad":
        return tone, f"{result.winner} is worse than the base model.", f"{numbers}. Do not use it."
    detail = f"{numbers}. The interval includes 0: this may be chance. Do not rely on the winner."
    return tone, f"{result.winner} is NOT clearly better than the base model.", detail


def _adjusted(test: PairedTest) -> str:
    if test.adjusted_p is None or test.num_tests < 2:
        return ""
    return f"; {formatting.p_value(test.adjusted_p)} after Holm for {test.num_tests} tests"


def _against_default(view: SweepView) -> str:
    """Whether searching paid: the winner against the experiment's own recipe."""
    result = view.result
    if result is None or result.default is None:
        return ""
    if result.default == result.winner:
        own = "The winner is the experiment's own recipe"
        return f"{own}: the search found nothing better." if len(view.trials) > 1 else f"{own}."
    test = view.against(result.default)
    if test is None:
        return ""
    words = {"good": "clearly better", "unclear": "not clearly better", "bad": "worse"}
    return (
        f"Against the experiment's own recipe ({result.default}) it is "
        f"{words[clearly(test, view.mode)]}: {formatting.signed(test.difference)} "
        f"({interval(test.lower, test.upper, 'signed')})."
    )


def _stations(view: SweepView) -> list[Station]:
    stations = []
    for role in ("base", "default", "winner"):
        scores = view.report_scores(role)
        if scores is None or view.metric not in scores.metrics:
            continue
        if role == "default" and view.role_of(role) == view.role_of("winner"):
            continue
        estimate = scores.metrics[view.metric]
        trial_id = view.role_of(role)
        sizes = (scores.num_samples, scores.num_groups)
        stations.append(Station(role, trial_id, estimate, *sizes))
    if not stations:
        return []
    ends = [end for s in stations for end in (s.estimate.lower, s.estimate.upper)]
    ends = [end for end in (*ends, *(s.estimate.value for s in stations)) if math.isfinite(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    width = (high - low) or 1.0
    low, width = low - 0.08 * width, 1.16 * width

    def place(value: float) -> float:
        return round(100 * (value - low) / width, 2) if math.isfinite(value) else 0.0

    return [
        replace(
            station,
            start=place(station.estimate.lower),
            middle=place(station.estimate.value),
            end=place(station.estimate.upper),
        )
        for station in stations
    ]


def _facts(view: SweepView) -> list[tuple[str, str, str]]:
    total = (
        "wall time" if view.result else "from the first to the last event of the ledger",
        formatting.duration(view.seconds),
    )
    trials = ("Trials", str(len(view.trials)), tally(view))
    time = ("Total time", total[1], total[0])
    if view.result is None:
        return [*_best_so_far(view), time, _last_event(view)]
    result = view.result
    corrected = result.corrected
    touches = view.num_report_touches
    confidence = formatting.percent(view.confidence)
    text = f"at step {result.winner_step:,}; flattered by having been picked"
    scored = dict(view.winner.estimates(view.metric)) if view.winner else {}
    if picked := scored.get(result.winner_step):
        text += f"; {confidence} interval {interval(picked.lower, picked.upper)}"
    facts = [("Naive select score", formatting.score(result.naive), text)]
    if corrected:
        reach = interval(corrected.lower, corrected.upper)
        text = f"selection bias removed; {confidence} interval {reach}"
        facts.append(("Bias-corrected", formatting.score(corrected.value), text))
    facts += _lineage(view)
    facts += [*_own_seeds(view), *_other_seeds(view)]
    times = "once" if touches == 1 else f"{touches} times"
    touched = ("Report split touched", times, "every scoring of a checkpoint on it is counted")
    return [
        *facts,
        *_without_overlap(view),
        *_detectable(view),
        *_ties(view),
        touched,
        trials,
        time,
    ]


def _lineage(view: SweepView) -> list[tuple[str, str, str]]:
    """Of a winner that is a clone: what it was trained with on its way."""
    if view.winner is None:
        return []
    legs = lineage(view.winner.trial_id, view.winner.record.recipe, view.clone_origins)
    if len(legs) < 2:
        return []
    changed = schedule(legs)
    found = f"found by a schedule, {changed}" if changed else "found by a clone"
    names = ", then ".join(leg.trial_id for leg in legs)
    text = f"{found}; the winner's recipe alone, trained from the beginning, does not give it"
    return [("Lineage", names, text)]


def _own_seeds(view: SweepView) -> list[tuple[str, str, str]]:
    """The mean by which the winner's recipe was picked, where recipes have several seeds."""
    own = view.result.own_seeds() if view.result else None
    if own is None:
        return []
    text = (
        f"the winner's recipe with its {len(own.values)} seeds, on select: it was picked by this "
        f"mean, and {own.trial_id} as the best of them with {formatting.score(own.picked)}"
    )
    shown = f"{formatting.score(own.mean)} ± {formatting.score(own.spread)}"
    return [("Over its seeds", shown, text)]


def _other_seeds(view: SweepView) -> list[tuple[str, str, str]]:
    """What the winner's recipe scored with other seeds, and whether it is still the best."""
    seeds = view.result.seeds() if view.result else []
    if view.result is None or not seeds:
        return []
    own = seeds[0]
    shown = ", ".join(formatting.score(value) for value in own.values) or "none ended"
    if len(own.values) > 1 and own.mean is not None:
        shown = f"{formatting.score(own.mean)} ± {formatting.score(own.spread)}"
    number = f"{len(own.values)} other seed{'s' if len(own.values) != 1 else ''}"
    failed = f"; {own.num_failed} failed" if own.num_failed else ""
    text = (
        f"the winner's recipe again with {number}, on select{failed}; picked with {own.picked:.3f}"
    )
    best = view.result.best_by_seeds()
    if best is not None:
        means = {entry.trial_id: entry.mean for entry in seeds}
        text += (
            f". Still the best of {len(seeds)} recipes by the mean"
            if best == view.result.winner
            else f". NOT the best by the mean: {best} has {formatting.score(means[best])}"
        )
    return [("With other seeds", shown, text)]


def _without_overlap(view: SweepView) -> list[tuple[str, str, str]]:
    """The winner's score on the samples of `report` that are like no training sample."""
    result = view.result
    if result is None or result.num_clean is None:
        return []
    if "winner" not in result.clean:
        return [("Without overlap", formatting.MISSING, "every report sample is like one of train")]
    found = result.clean["winner"]
    base = result.clean.get(BASE_TRIAL)
    against = f"; base {formatting.score(base.value)}" if base else ""
    text = (
        f"winner on the {formatting.count(result.num_clean)} report samples that are like no "
        f"training sample, {interval(found.lower, found.upper)}{against}"
    )
    return [("Without overlap", formatting.score(found.value), text)]


def _detectable(view: SweepView) -> list[tuple[str, str, str]]:
    """The smallest difference that the splits would likely have told."""
    found = view.result.detectable if view.result else {}
    if "report" not in found:
        return []
    select = f"; on select {formatting.score(found['select'])}" if "select" in found else ""
    text = f"the smallest on report that a paired test finds in 80 % of sweeps{select}"
    return [("Detectable difference", formatting.score(found["report"]), text)]


def _rivals(view: SweepView) -> list[TrialView]:
    """The trials that could have won: scored and not failed."""
    return [t for t in view.trials if view.best(t) and t.record.status != "failed"]


def _ties(view: SweepView) -> list[tuple[str, str, str]]:
    """The trials that cannot be told from the winner, and the cheapest of them."""
    result = view.result
    if result is None:
        return []
    scored = [trial for trial in _rivals(view) if trial is not view.winner]
    others = [name for name in result.indistinguishable if name != result.winner]
    value = f"{len(others)} of {len(scored)}"
    if not others:
        text = "no other trial is within its interval" if scored else "no other trial was scored"
        return [("Tied with the winner", value, text)]
    cheapest = result.indistinguishable[0]
    if cheapest == result.winner:
        text = "cannot be told apart from the winner, which is itself the cheapest of them"
    else:
        trial = view.trial(cheapest)
        cost = ""
        if trial:
            parameters = formatting.compact(trial.record.trainable_parameters)
            cost = f" ({parameters} parameters, {formatting.duration(trial.record.seconds)})"
        text = f"cannot be told apart from the winner; the cheapest of them is {cheapest}{cost}"
    return [("Tied with the winner", value, text)]


def _best_so_far(view: SweepView) -> list[tuple[str, str, str]]:
    best = [(trial, found) for trial in _rivals(view) if (found := view.best(trial))]
    if not best:
        return []
    sign = -1.0 if view.mode == "max" else 1.0
    trial, (step, estimate) = min(best, key=lambda pair: sign * pair[1][1].value)
    text = f"{trial.trial_id} at step {step:,}, on select; nothing is decided by it"
    return [("Best so far", formatting.score(estimate.value), text)]


def _last_event(view: SweepView) -> tuple[str, str, str]:
    if not view.ledger or "time" not in view.ledger[-1]:
        return "Last event", formatting.MISSING, "the ledger is empty"
    event = view.ledger[-1]
    when = datetime.fromtimestamp(float(event["time"]), UTC)
    text = f"{event.get('event', '')} {event.get('trial_id', '')}".strip()
    return "Last event", f"{when:%H:%M}", f"UTC, {when:%Y-%m-%d}: {text}"
