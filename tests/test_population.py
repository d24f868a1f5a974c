"""Population based training: the pure rule, what the ledger keeps, and the clones' checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import experiment
from pydantic import ValidationError
from ray.tune.experiment import Trial
from tune_trial import TuneTrial

from raytune_vlm.config.schedulers import PbtScheduler
from raytune_vlm.errors import CheckpointError
from raytune_vlm.records import SweepFolder, read_json, read_json_lines, write_json
from raytune_vlm.report.lineage import caution, lineage, schedule
from raytune_vlm.sweep.ledger import Ledger, TrialState, apply_exploits, replay, trial_name
from raytune_vlm.sweep.population import Exploiting, Population
from raytune_vlm.sweep.runner import Session
from raytune_vlm.sweep.searcher import OptunaSearcher
from raytune_vlm.sweep.turns import NEVER
from raytune_vlm.train.checkpoint import recipe_digest

METRIC, RATE = "exact_match@strip", "train.learning_rate"
SPACE = {
    "lora.rank": {"type": "choice", "values": [2, 4]},
    RATE: {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
}


def config(scheduler=(), train=(), **sweep):
    pbt = {"type": "pbt", "interval": 2, **dict(scheduler)}
    plain = {"num_trials": 4, "search_space": SPACE, "scheduler": pbt, **sweep}
    return experiment(train={"max_steps": 6, "warmup_steps": 1, **dict(train)}, sweep=plain)


@st.composite
def populations(draw):
    quantile = draw(st.sampled_from([0.2, 0.25, 0.5]))
    num_trials = draw(st.integers(math.ceil(1 / quantile), 12))
    return Population(
        rungs=(2, 4, 6, 8)[: draw(st.integers(2, 4))],
        num_trials=num_trials,
        at_once=draw(st.integers(1, 5)),
        metric=METRIC,
        mode=draw(st.sampled_from(["max", "min"])),
        seed=draw(st.integers(0, 9)),
        config=PbtScheduler(type="pbt", quantile=quantile),
        ranges={RATE: (1e-4, 1e-1)},
    )


class Game:
    """A population that is played: scores, failures and pins are functions of trial and step."""

    def __init__(self, rule, luck, ledger=None, states=None, decided=0):
        self.rule, self.luck, self.ledger = rule, luck, ledger
        self.states = {} if states is None else states
        self.decided, self.exploited = decided, []
        for state in self.states.values():
            self.pin(state)

    def drawn(self, *words):
        return random.Random(f"{self.luck}/{words}").random()

    def write(self, event, **fields):
        return self.ledger.append(event, **fields) if self.ledger else 0

    def play(self, order):
        """Go on to the end; running trials report in a random order."""
        arrival = random.Random(order)
        for _ in range(1000):
            rung = self.rule.due(self.states.values(), self.decided)
            if rung is not None:
                self.exploit(rung)
            action = self.rule.decide(self.states.values(), self.decided)
            running = [s for s in self.states.values() if self.rule.is_running(s)]
            if action.kind == "end":
                return self
            if action.kind in ("start", "promote"):
                assert len(running) < self.rule.at_once
            if action.kind == "start":
                self.start()
            elif action.kind == "promote":
                assert self.states[action.trial_id].replaced_by is None
                self.states[action.trial_id].promoted_to = action.step
                self.write("promoted", trial_id=action.trial_id, step=action.step)
            else:
                assert running, "nobody runs, and everybody waits"
                self.report(arrival.choice(running))
        raise AssertionError("it never ends")

    def start(self):
        number = len(self.states)
        recipe = {RATE: round(1e-4 + 0.09 * self.drawn(number), 6), "lora.rank": 4}
        state = TrialState(trial_name(number), number, recipe)
        self.states[state.trial_id] = self.pin(state)
        self.write("proposed", trial_id=state.trial_id, number=number, recipe=recipe)

    def pin(self, state):
        state.pinned = state.origin is None and self.drawn(state.number, "pin") < 0.15
        return state

    def report(self, state):
        rung = self.rule.target(state)
        if self.drawn(state.number, rung, "failed") < 0.08:
            state.ended = "failed"
            self.write("failed", trial_id=state.trial_id, step=rung, message="error: it broke")
            return
        value = round(self.drawn(state.number, rung), 1)
        value = math.nan if self.drawn(state.number, rung, "nan") < 0.05 else value
        state.scored[rung] = {METRIC: value}
        self.write("scored", trial_id=state.trial_id, step=rung, scores={METRIC: value})
        if rung == self.rule.rungs[-1]:
            state.ended = "finished"
            self.write("finished", trial_id=state.trial_id, step=rung)

    def exploit(self, rung):
        before = {name: replace(state) for name, state in self.states.items()}
        found = self.rule.exploits(self.states.values(), rung, len(self.states))
        check(self.rule, before, rung, found)
        shuffled = random.Random(rung).sample(list(before.values()), len(before))
        assert self.rule.exploits(shuffled, rung, len(self.states)) == found
        row = {"step": rung, "exploits": found}
        apply_exploits(self.states, {"seq": self.write("exploited", **row), **row})
        self.exploited.append(row)
        self.decided = rung
        for state in self.states.values():
            if state.leaves and state.ended is None:
                state.ended = "stopped"
                self.write("stopped", trial_id=state.trial_id, step=rung, message=state.leaves)


def check(rule, states, rung, found):
    """What must hold of what is replaced at a rung."""
    there = [
        s
        for s in states.values()
        if s.replaced_by is None and (s.origin is None or s.origin["step"] < rung)
    ]
    assert len(there) == rule.num_trials, "the population grew or shrank"
    sign = 1 if rule.mode == "max" else -1

    def worth(state):
        value = state.scored.get(rung, {}).get(METRIC, math.nan)
        return -math.inf if state.ended or math.isnan(value) else sign * value

    replaced = [states[entry["replaces"]] for entry in found]
    parents = [states[entry["clone"]["origin"]["parent"]] for entry in found]
    names = [state.trial_id for state in replaced]
    assert len(set(names)) == len(names)
    assert not set(names) & {state.trial_id for state in parents}
    assert not any(state.pinned and state.ended is None for state in replaced)
    useless = [s for s in there if worth(s) == -math.inf and (s.ended or not s.pinned)]
    if found:
        assert {s.trial_id for s in useless} <= set(names)
        free = [s for s in there if not s.pinned or s.ended]
        count = max(rule.config.num_replaced(len(there)), len(useless))
        assert len(found) <= count and (len(found) == count or len(free) < len(there))
    else:
        alive = [s for s in there if worth(s) > -math.inf]
        assert not alive or any(s.pinned for s in there)
    for state, parent in zip(replaced, parents, strict=True):
        assert worth(parent) >= worth(state) and worth(parent) > -math.inf
    for number, entry in enumerate(found, start=len(states)):
        clone, parent = entry["clone"], states[entry["clone"]["origin"]["parent"]]
        assert clone["number"] == number and clone["origin"]["recipe"] == parent.recipe
        assert 1e-4 <= clone["recipe"][RATE] <= 1e-1 and clone["recipe"]["lora.rank"] == 4
        assert clone["recipe"][RATE] != parent.recipe[RATE]
    made = [(e["clone"]["origin"]["parent"], e["clone"]["recipe"][RATE]) for e in found]
    assert len(set(made)) >= min(len(made), rule.config.num_replaced(len(there)))


@settings(deadline=None, max_examples=120, derandomize=True)
@given(populations(), st.integers(0, 1000))
def test_the_worst_make_room_for_clones_of_the_best_in_whatever_order_results_come(rule, luck):
    ends = [Game(rule, luck).play(order) for order in (0, 1)]
    assert ends[0].exploited == ends[1].exploited
    places = [s for s in ends[0].states.values() if s.replaced_by is None]
    assert len(places) == rule.num_trials
    assert all(state.ended for state in ends[0].states.values()), "somebody waits for ever"


@pytest.mark.parametrize("luck", [3, 4])
def test_a_driver_killed_at_any_line_goes_on_with_the_same_decisions(tmp_path, luck):
    rule = Population(
        rungs=(2, 4, 6),
        num_trials=6,
        at_once=2,
        metric=METRIC,
        mode="max",
        seed=1,
        config=PbtScheduler(type="pbt", quantile=0.34),
        ranges={RATE: (1e-4, 1e-1)},
    )
    file = tmp_path / "whole.jsonl"
    whole = Game(rule, luck, Ledger(file)).play(order=0)
    assert len(whole.exploited) == 2 and all(row["exploits"] for row in whole.exploited)
    lines = file.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    for number in range(len(lines)):
        cut.write_bytes(b"".join(lines[:number]))
        rows, states = [json.loads(line) for line in lines[:number]], replay(cut)
        made = [row for row in rows if row["event"] == "exploited"]
        decided = max((row["step"] for row in made), default=0)
        for state in states.values():  # as `search` ends them on the next life
            if state.leaves and state.ended is None:
                state.ended = "stopped"
        after = Game(rule, luck, states=states, decided=decided).play(order=number)
        assert after.exploited == whole.exploited[len(made) :]
        assert after.states.keys() == whole.states.keys()


def test_who_is_paused_by_hand_is_waited_for_unless_the_search_is_drained():
    rule = Population.of(config())
    states = [TrialState(f"t{n}", n, {RATE: 1e-2}, {2: {METRIC: n / 10}}) for n in range(4)]
    states[1].scored, states[1].held = {}, True
    assert rule.due(states, 0) is None and rule.decide(states, 0).kind == "end", "Turns waits then"
    drained = replace(rule, waits_for_held=False)
    assert drained.due(states, 0) == 2 and drained.decide(states, 0).kind == "wait"
    assert [entry["replaces"] for entry in drained.exploits(states, 2, 4)] == ["t1"]
    states[1].held = False
    assert rule.decide(states, 0).kind == "wait", "it runs"
    states[1].scored[2] = {METRIC: 0.05}
    assert [entry["replaces"] for entry in rule.exploits(states, 2, 4)] == ["t0"]
    infeasible = replace(rule, is_feasible=lambda state: state.number != 3)
    (entry,) = infeasible.exploits(states, 2, 4)
    assert (entry["replaces"], entry["clone"]["origin"]["parent"]) == ("t3", "t2")


def test_a_clone_made_by_hand_catches_up_and_is_compared_with_the_others():
    rule = Population.of(config())
    states = [TrialState(f"t{n}", n, {RATE: 1e-2}, {2: {METRIC: n / 10}}) for n in range(4)]
    for state in states:
        state.promoted_to, state.scored[4] = 4, {METRIC: state.number / 10}
    origin = {"parent": "t0", "step": 1, "recipe": {}}
    late = TrialState("t4", 4, {RATE: 1e-2}, {2: {METRIC: 0.9}}, promoted_to=2, origin=origin)
    assert rule.due([*states, late], 2) is None
    action = rule.decide([*states, late], 2)
    assert (action.kind, action.trial_id, action.step) == ("promote", "t4", 4)
    late.promoted_to, late.scored[4] = 4, {METRIC: 0.9}
    assert rule.due([*states, late], 2) == 4


def test_at_an_end_of_the_range_a_clone_goes_the_other_way():
    rule = Population.of(config())
    states = [TrialState(f"t{n}", n, {RATE: 1e-4}, {2: {METRIC: n / 10}}) for n in range(4)]
    (entry,) = rule.exploits(states, 2, 4)
    assert entry["clone"]["recipe"] == {RATE: 1.25e-4}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_trials": 3}, "num_trials must be at least 4"),
        ({"num_replicates": 2}, "num_replicates=2 and scheduler.type=pbt exclude each other"),
        ({"stop_when_stable": {"trials": 2}}, "stop_when_stable has no effect"),
        ({"scheduler": {"interval": 6}}, "interval=6 must be below train.max_steps=6"),
        ({"scheduler": {"quantile": 0.6}}, "less than or equal to 0.5"),
        ({"scheduler": {"factors": [0.5, 0.8]}}, "one below 1 and one above 1"),
        ({"scheduler": {"factors": [0.8, 1, 2]}}, "must differ from 1"),
        ({"scheduler": {"perturbed": ["lora.rank"]}}, "train.learning_rate"),
        ({"scheduler": {"perturbed": ["train.weight_decay"]}}, "not a key of the search space"),
        ({"scheduler": {"perturbed": []}}, "at least 1 item"),
        (
            {"search_space": {RATE: {"type": "choice", "values": [1e-3, 1e-2]}}},
            "must be of type uniform or loguniform, above 0",
        ),
        (
            {
                "search_space": {
                    "train.weight_decay": {"type": "uniform", "lower": 0.01, "upper": 0.1}
                },
                "scheduler": {"perturbed": ["train.weight_decay"]},
            },
            "own train.weight_decay=0.0 cannot be multiplied",
        ),
    ],
)
def test_a_population_that_could_not_work_is_refused(changes, reason):
    with pytest.raises(ValidationError) as error:
        config(**changes)
    assert reason in str(error.value)
    assert config().rungs == (2, 4, 6)


def test_a_lineage_is_told_by_what_changed():
    origins = {
        "t5": {"parent": "t1", "step": 20, "recipe": {RATE: 1e-3, "lora.rank": 4}},
        "t9": {"parent": "t5", "step": 60, "recipe": {RATE: 8e-4, "lora.rank": 4}},
    }
    legs = lineage("t9", {RATE: 1e-3, "lora.rank": 4}, origins)
    assert [(leg.trial_id, leg.until) for leg in legs] == [("t1", 20), ("t5", 60), ("t9", None)]
    assert schedule(legs) == f"{RATE} 1e-3 to step 20, 8e-4 to step 60, 1e-3 from there"
    assert "t9 is a clone, trained as t1, then t5, then t9." in caution(legs)
    assert all(line.startswith("# ") for line in caution(legs).splitlines())
    assert caution(lineage("t1", {}, origins)) == ""
    round_trip = {"a": {"parent": "b", "step": 1, "recipe": {}}}
    round_trip["b"] = {"parent": "a", "step": 1, "recipe": {}}
    assert len(lineage("a", {}, round_trip)) == 3, "a damaged ledger ends too"


# --- the scheduler of Ray Tune -------------------------------------------------------------------


def checkpoint(folder, text):
    """A folder that passes for a whole checkpoint."""
    files = {"adapter_model.safetensors": text, "optimizer.safetensors": text * 2}
    files["state.json"] = json.dumps({"step": 2, "recipe_digest": "old", "samples_seen": 12})
    manifest = {}
    for name, content in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
        digest = hashlib.sha256(content.encode()).hexdigest()
        manifest[name] = {"sha256": digest, "bytes": len(content)}
    write_json(folder / "manifest.json", manifest)


class Life:
    """One life of a driver of a sweep of four trials, of which the ledger has some."""

    def __init__(self, folder):
        said = []
        states, ledger = replay(folder.ledger_file), Ledger(folder.ledger_file)
        monitor = SimpleNamespace(say=said.append)
        parts = (config(), folder, monitor, None, None, ledger, states, 0.0)
        self.running, self.said = Session(*parts), said
        self.searcher = OptunaSearcher(config(), ledger, states, folder.study_file, None)
        self.turns = Exploiting(self.running, self.searcher, NEVER)
        self.trials = {}

    def add(self, *names):
        for name in names:
            self.trials[name] = TuneTrial(name)
            self.turns.on_trial_add(None, self.trials[name])

    def statuses(self):
        return {name: trial.status for name, trial in self.trials.items()}


@pytest.fixture
def begun(tmp_path):
    """Four trials that wait at step 2, t0003 being the best, with the checkpoints of two."""
    folder = SweepFolder(tmp_path)
    ledger = Ledger(folder.ledger_file)
    for number in range(4):
        name = trial_name(number)
        recipe = {"lora.rank": 4, RATE: 1e-2}
        ledger.append("proposed", trial_id=name, number=number, recipe=recipe)
        ledger.append("scored", trial_id=name, step=2, scores={METRIC: number / 10})
        ledger.append("paused", trial_id=name, step=2)
    for number in (2, 3):
        checkpoint(folder.trial(trial_name(number)).checkpoint(2), f"of {number}")
    return folder


def test_ray_tune_stops_the_worst_and_goes_on_with_a_clone_of_the_best(begun):
    life = Life(begun)
    life.add("t0000", "t0001", "t0002", "t0003")
    first = life.turns.choose_trial_to_run(TuneTrial)
    assert first is life.trials["t0001"] and first.config["until"] == 4
    assert life.statuses()["t0000"] == Trial.TERMINATED
    assert life.running.states["t0000"].leaves == "replaced by t0004"
    assert any("t0000 is replaced by t0004, a clone of t0003" in line for line in life.said)
    offered = [life.searcher.suggest(f"x{n}")["trial_id"] for n in range(5)]
    assert offered[-1] == "t0004", "those of the earlier life come first"
    life.add("t0004")
    clone, own = life.trials["t0004"], begun.trial("t0004").checkpoint(2)
    assert clone.status == Trial.PAUSED and clone.config["until"] == 2
    assert (own / "optimizer.safetensors").read_text() == "of 3of 3"
    digest = recipe_digest(config().with_recipe(life.running.states["t0004"].recipe))
    state = {"step": 2, "samples_seen": 12, "recipe_digest": digest}
    assert read_json(own / "state.json") == state
    life.running.states["t0001"].scored[4] = {METRIC: 0.5}
    rows = read_json_lines(begun.ledger_file)[-2:]
    assert [row["event"] for row in rows] == ["exploited", "promoted"]
    # As `search` does it where the driver was killed here.
    again = Life(begun)
    dropped = again.searcher.drop_interrupted(lambda state: state.leaves is not None)
    assert [state.trial_id for state in dropped] == ["t0000"] and again.turns.decided == 2
    again.running.states["t0000"].ended = "stopped"
    again.add("t0001", "t0002", "t0003", "t0004")
    expected = [Trial.PENDING, *[Trial.PAUSED] * 3]
    assert list(again.statuses().values()) == expected, "t0001 was promoted already"


def test_a_clone_gets_its_checkpoint_in_the_next_life_if_the_driver_was_killed(begun):
    life = Life(begun)
    row = {"step": 2, "exploits": life.turns.rule.exploits(life.running.states.values(), 2, 4)}
    life.running.ledger.append("exploited", **row)
    own = begun.trial("t0004").checkpoint(2)
    assert not own.exists()
    Life(begun)
    assert (own / "adapter_model.safetensors").read_text() == "of 3"
    (begun.trial("t0003").checkpoint(2) / "state.json").write_text("{}")
    Life(begun)  # the copy is there
    for file in own.iterdir():
        file.unlink()
    own.rmdir()
    with pytest.raises(CheckpointError, match="instead of"):
        Life(begun)


def test_a_parent_whose_checkpoint_is_damaged_is_none(begun):
    (begun.trial("t0003").checkpoint(2) / "optimizer.safetensors").write_text("torn")
    life = Life(begun)
    life.add("t0000", "t0001", "t0002", "t0003")
    assert life.turns.choose_trial_to_run(TuneTrial) is life.trials["t0000"]
    assert "t0003 is no parent" in life.said[0] and "no trial is replaced" in life.said[1]
    (row,) = [r for r in read_json_lines(begun.ledger_file) if r["event"] == "exploited"]
    assert row["exploits"] == []
