"""The rule of successive halving: properties of the pure function, and what the ledger keeps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import experiment
from ray.tune.experiment import Trial
from tune_trial import TuneTrial

from raytune_vlm.records import read_json_lines
from raytune_vlm.sweep.ledger import Ledger, TrialState, replay
from raytune_vlm.sweep.scheduler import Halving, Rule, decide
from raytune_vlm.sweep.turns import Open

METRIC = "exact_match@strip"
SCORES = st.one_of(
    st.floats(0, 1, width=16), st.sampled_from([0.0, 0.5, math.nan, -math.inf, math.inf])
)


@st.composite
def games(draw):
    """A rule, the score of every trial at every rung, which fail, and who is served when."""
    rungs = (1, 3, 9, 27)[: draw(st.integers(1, 4))]
    num_trials = draw(st.integers(1, 14))
    rule = Rule(
        rungs=rungs,
        reduction_factor=draw(st.sampled_from([2, 3, 2.5])),
        min_results=draw(st.integers(1, 16)),
        num_trials=num_trials,
        at_once=draw(st.integers(1, 5)),
        metric=METRIC,
        mode=draw(st.sampled_from(["max", "min"])),
    )
    values = [[draw(SCORES) for _ in rungs] for _ in range(num_trials)]
    failing = draw(st.sets(st.integers(0, num_trials - 1), max_size=3))
    return rule, values, failing, draw(st.integers(0, 1000))


def play(game, check=lambda states, action, rule: None):
    """Carry out what `decide` says until the end; the running trials report in a random order."""
    rule, values, failing, seed = game
    draw, states = np.random.default_rng(seed), {}
    for _ in range(1000):
        action = decide(states.values(), rule)
        check(states, action, rule)
        running = [state for state in states.values() if rule.is_running(state)]
        if action.kind == "end":
            return states
        if action.kind == "start":
            state = TrialState(f"t{len(states)}", len(states), {})
            states[state.trial_id] = state
        elif action.kind == "promote":
            states[action.trial_id].promoted_to = action.step
        else:
            assert running, "nobody runs, and everybody waits"
            state = running[draw.integers(len(running))]
            rung = rule.target(state)
            if state.number in failing and rung == rule.rungs[-1]:
                state.ended = "failed"
                continue
            value = values[state.number][rule.rungs.index(rung)]
            state.scored[rung] = {METRIC: value}
            if rung == rule.rungs[-1]:
                state.ended = "finished"
    raise AssertionError("it never ends")


def better(rule, value, other):
    """Whether a score is better than another; one that is not a number is the worst."""
    if math.isnan(value) or math.isnan(other):
        return math.isnan(other) and not math.isnan(value)
    return value > other if rule.mode == "max" else value < other


def sound(states, action, rule):
    """What must hold of every single decision."""
    running = sum(rule.is_running(state) for state in states.values())
    if action.kind in ("start", "promote"):
        assert running < rule.at_once
    if action.kind != "promote":
        return
    chosen = states[action.trial_id]
    rung = rule.target(chosen)
    assert rule.is_paused(chosen) and action.step > rung
    there = [state for state in states.values() if rung in state.scored]
    value = chosen.scored[rung][METRIC]
    assert not math.isnan(value)
    ahead = [state for state in there if better(rule, state.scored[rung][METRIC], value)]
    still = [state for state in ahead if rule.is_paused(state) and rule.target(state) == rung]
    assert not still, "a better one of the same rung was left waiting"
    assert len(ahead) < max(1, math.floor(len(there) / rule.reduction_factor))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(games())
def test_only_the_best_of_a_rung_go_on_and_every_sweep_ends(game):
    rule, values, failing, _ = game
    states = play(game, sound)
    assert len(states) == rule.num_trials
    for state in states.values():
        if any(
            math.isnan(row[METRIC]) for step, row in state.scored.items() if step != rule.rungs[-1]
        ):
            assert state.ended is None
    if not failing and not np.isnan(values).any():
        assert any(state.ended == "finished" for state in states.values()), (
            "nobody was trained whole"
        )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(games())
def test_the_decision_follows_from_the_ledger_alone(game):
    def again(states, action, rule):
        copies = [
            TrialState(
                s.trial_id,
                s.number,
                {},
                dict(s.scored),
                s.ended,
                promoted_to=s.promoted_to,
            )
            for s in reversed(states.values())
        ]
        assert decide(copies, rule) == action

    play(game, again)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(games())
def test_where_a_rung_is_complete_first_the_order_of_arrival_does_not_matter(game):
    rule, values, _, seed = game
    patient = Rule(**{**vars(rule), "min_results": 10_000})
    ends = [
        {
            state.trial_id: (state.promoted_to, state.ended)
            for state in play((patient, values, set(), order)).values()
        }
        for order in (seed, seed + 1)
    ]
    assert ends[0] == ends[1]
    counts = [
        sum(rung in s.scored for s in play((patient, values, set(), 0)).values())
        for rung in rule.rungs
    ]
    for there, gone in itertools.pairwise(counts):
        assert gone <= max(1, math.floor(there / rule.reduction_factor))


def test_trials_that_were_paused_or_promoted_are_so_after_a_resume(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number, value in enumerate([0.1, 0.9]):
        ledger.append("proposed", trial_id=f"t{number}", number=number, recipe={})
        ledger.append("scored", trial_id=f"t{number}", step=10, scores={METRIC: value})
        ledger.append("paused", trial_id=f"t{number}", step=10)
    ledger.append("promoted", trial_id="t1", step=20)
    states = replay(tmp_path / "ledger.jsonl")
    scheduler = {"type": "halving", "grace_period": 10, "reduction_factor": 2}
    config = experiment(train={"max_steps": 40}, sweep={"num_trials": 2, "scheduler": scheduler})
    rule = Rule.of(config)
    assert rule.rungs == config.rungs == (10, 20, 40)
    assert rule.is_paused(states["t0"]) and rule.is_running(states["t1"])


def test_ray_tune_pauses_promotes_and_stops_what_the_rule_says(tmp_path):
    states = {
        name: TrialState(name, number, {}, {1: {METRIC: value}})
        for number, (name, value) in enumerate({"t0": 0.2, "t1": 0.9, "t2": 0.5}.items())
    }
    states["t3"] = TrialState("t3", 3, {})
    rule = Rule((1, 3), 2, 1, 4, 2, METRIC, "max")
    scheduler = Halving(rule, states, Ledger(tmp_path / "ledger.jsonl"))
    trials = {name: TuneTrial(name) for name in states}
    scheduler.on_trial_add(None, trials["t0"])
    assert scheduler.choose_trial_to_run(TuneTrial) is None, "t1 is not known to Ray Tune yet"
    for name in ("t1", "t2", "t3"):
        scheduler.on_trial_add(None, trials[name])
    assert [trial.status for trial in trials.values()] == [Trial.PAUSED] * 3 + [Trial.PENDING]
    assert scheduler.choose_trial_to_run(TuneTrial) is trials["t1"]
    assert trials["t1"].config["until"] == 3 and trials["t1"].config["reported"] == [1]
    assert scheduler.choose_trial_to_run(TuneTrial) is None, "both executors are busy"
    for name, step, expected in (("t3", 1, "PAUSE"), ("t1", 3, "CONTINUE")):
        assert scheduler.on_trial_result(None, trials[name], {"step": step}) == expected
    assert scheduler.on_trial_result(None, trials["t3"], {"failed": "error"}) == "CONTINUE"
    states["t3"].scored[1], trials["t3"].status = {METRIC: 0.1}, Trial.PAUSED
    assert scheduler.choose_trial_to_run(TuneTrial) is trials["t2"]
    for name in ("t1", "t2"):
        states[name].ended, trials[name].status = "finished", Trial.TERMINATED
    assert scheduler.choose_trial_to_run(TuneTrial) is None
    assert {trial.status for trial in trials.values()} == {Trial.TERMINATED}
    rows = read_json_lines(tmp_path / "ledger.jsonl")
    assert [(row["event"], row["trial_id"]) for row in rows] == [
        ("promoted", "t1"),
        ("promoted", "t2"),
    ]


@pytest.mark.parametrize("num_trials", [1, 2, 3, 8])
def test_a_small_sweep_trains_its_best_to_the_end(num_trials):
    rule = Rule((10, 30, 90), 3, 1, num_trials, 2, METRIC, "max")
    states = play((rule, [[n / 10] * 3 for n in range(num_trials)], set(), 0))
    finished = [state.number for state in states.values() if state.ended == "finished"]
    assert finished[-1] == num_trials - 1 if num_trials < 3 else finished


def test_no_trial_begins_before_the_proxy_of_a_paused_one_is_free(tmp_path):
    states = {"t0": TrialState("t0", 0, {})}
    rule = Rule((1, 3), 2, 1, 4, 1, METRIC, "max")
    scheduler = Halving(rule, states, Ledger(tmp_path / "ledger.jsonl"))
    trial = TuneTrial("t0")
    scheduler.on_trial_add(None, trial)
    trial.status = Trial.RUNNING
    assert scheduler.on_trial_result(None, trial, {"step": 1}) == "PAUSE"
    states["t0"].scored[1] = {METRIC: 0.5}
    assert scheduler.next_action().kind == "wait", "Ray Tune would start a process for it"
    trial.status = Trial.PAUSED
    assert scheduler.next_action().kind != "wait"


def test_what_is_open_follows_the_trials():
    states = {name: TrialState(name, number, {}) for number, name in enumerate(("t0", "t1"))}
    still_open = Open(states)
    assert still_open() == [*states.values()]
    states["t0"].ended, states["t2"] = "failed", TrialState("t2", 2, {})
    states["t3"] = TrialState("t3", 3, {}, ended="stopped")
    assert still_open() == [states["t1"], states["t2"]]
