"""Constraints, budgets, objectives, warm start: what a search may use and what it starts from."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import experiment
from test_searchers import METRIC, NUMBERS, OBJECTIVES, Sweep, sampled

from raytune_vlm.errors import ConfigError
from raytune_vlm.evaluate.scoring import WEIGHT
from raytune_vlm.records import SweepFolder, write_json
from raytune_vlm.report.leaderboard import leaderboard
from raytune_vlm.report.loading import load_view
from raytune_vlm.sweep.budget import (
    Budget,
    cost,
    expected_steps,
    held_seconds,
    planner_line,
)
from raytune_vlm.sweep.closing import Closing
from raytune_vlm.sweep.constraints import Predictor, check_constraints, infeasible
from raytune_vlm.sweep.front import besides, front_of, pareto_front
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.ledger import Ledger, TrialState, events, replay
from raytune_vlm.sweep.trial_job import TrialJob
from raytune_vlm.sweep.warm_start import WarmTrial, check_warm_start, warm_trials

RANKS = {
    "lora.rank": {"type": "choice", "values": [1, 4, 64]},
    "train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
}


@pytest.fixture(scope="module")
def per_rank():
    return Predictor(
        experiment(lora={"rank": 1}, sweep={"constraints": {"max_trainable_parameters": 1}})
    )({})["trainable_parameters"]


def limited(per_rank, **sweep):
    limits = {"max_trainable_parameters": int(per_rank * 16)}
    plain = {"num_trials": 6, "search_space": RANKS, "constraints": limits, **sweep}
    return experiment(lora={"rank": 4}, sweep=plain, train={"max_steps": 90})


def test_an_infeasible_proposal_is_told_and_not_trained(tmp_path, per_rank):
    config = limited(per_rank, searcher={"type": "random"})
    write_json(
        tmp_path / "experiment.json", {"experiment": config.model_dump(mode="json"), "data": "d"}
    )
    sweep = Sweep(tmp_path, config)
    trained = sweep.run()
    untrained = [state for state in sweep.states.values() if state.untrained]
    assert len(trained) == 6 and untrained
    assert all(recipe["lora.rank"] < 64 for _, recipe in trained)
    assert len(sweep.said) == len(untrained)
    assert "predicted trainable_parameters" in sweep.said[0]
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path / 'study.db'}")
    shown = {trial.user_attrs["trial"]: trial for trial in study.trials}[untrained[0].trial_id]
    assert shown.constraints["trainable_parameters"] == pytest.approx(3, abs=1e-3)
    assert shown.user_attrs["status"] == "infeasible" and shown.state.name == "PRUNED"

    again = replay(tmp_path / "ledger.jsonl")
    assert [state.untrained for state in again.values()] == [
        state.untrained for state in sweep.states.values()
    ]
    assert Sweep(tmp_path, config).searcher.is_done
    assert besides(config, again)["infeasible"].keys() == {s.trial_id for s in untrained}
    row = next(r for r in leaderboard(load_view(tmp_path)) if r.trial_id == untrained[0].trial_id)
    assert row.rank is None and row.outcome.startswith("infeasible: predicted trainable_param")


def test_tpe_learns_what_is_infeasible_and_is_rebuilt_with_it(tmp_path, per_rank):
    config = limited(per_rank, num_trials=8)
    whole = Sweep(tmp_path / "whole", config).run()
    broken: list = []
    for most in (3, None):
        broken += Sweep(tmp_path / "broken", config).run(most=most)
    assert dict(broken) == dict(whole)


def test_constraints_that_no_corner_keeps_are_refused(per_rank):
    config = limited(per_rank)
    check_constraints(config, Predictor(config))
    hopeless = limited(per_rank, constraints={"max_trainable_parameters": 10})
    with pytest.raises(
        ConfigError, match=r"no trial of the search space can keep them: at least trainable_par"
    ):
        check_constraints(hopeless, Predictor(hopeless))


def test_memory_is_predicted_where_it_is_limited():
    config = experiment(sweep={"constraints": {"max_memory_gb": 1e-6}, "search_space": RANKS})
    costs = Predictor(config)({"lora.rank": 1})
    assert 0.01 < costs["peak_memory_gb"] < 100
    assert Predictor(experiment())({"lora.rank": 1}) == {}


def test_memory_of_a_trial_among_others_is_not_taken_for_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("raytune_vlm.sweep.trial_job._peak_memory_gb", lambda: 70.0)
    run = SimpleNamespace(trainable={"text": 8})
    costs = []
    for host in (None, object()):
        worker = SimpleNamespace(experiment=experiment(), folder=SweepFolder(tmp_path), host=host)
        costs.append(TrialJob(worker, Job("t0", "trial", "t0", {}))._costs(run))
    assert costs[0]["peak_memory_gb"] == 70
    assert costs[1].keys() == {"trainable_parameters", "train_seconds"}


def test_a_search_without_feasible_proposals_ends(tmp_path, per_rank, monkeypatch):
    monkeypatch.setattr("raytune_vlm.sweep.searcher.MOST_INFEASIBLE", 3)
    closed = []
    config = limited(
        per_rank,
        constraints={"max_trainable_parameters": 10},
        searcher={"type": "random"},
    )
    sweep = Sweep(tmp_path, config, close=lambda kind, reason: closed.append((kind, reason)))
    assert sweep.start() is None
    assert closed == [
        ("infeasible", "the last 3 proposals were all predicted to break a constraint")
    ]


def state(number, value, seconds, parameters=100.0, ended="finished", step=90):
    return TrialState(
        f"t{number:04d}", number, {}, {step: {METRIC: value}}, ended,
        costs={step: {"train_seconds": seconds, "trainable_parameters": parameters}},
    )  # fmt: skip


def test_a_measured_limit_makes_a_trial_infeasible():
    config = experiment(sweep={"constraints": {"max_train_seconds": 10}})
    assert infeasible(config, state(0, 1.0, 9)) is None
    assert infeasible(config, state(0, 1.0, 12)) == (
        "measured train_seconds 12 > max_train_seconds=10"
    )


def test_the_front_is_of_trials_that_may_win():
    config = experiment(
        sweep={"objectives": OBJECTIVES, "constraints": {"max_trainable_parameters": 200}}
    )
    states = [
        state(0, 0.9, 50),
        state(1, 0.8, 20),
        state(2, 0.8, 30),
        state(3, 0.95, 10, ended="failed"),
        state(4, 0.99, 5, parameters=300),
        state(5, 0.1, 5, ended="stopped"),
    ]
    found = besides(config, {entry.trial_id: entry for entry in states})
    assert [row["trial_id"] for row in found["front"]] == ["t0000", "t0001", "t0005"]
    assert found["front"][0] == {
        "trial_id": "t0000", "step": 90, METRIC: 0.9, "train_seconds": 50,
    }  # fmt: skip
    assert found["objectives"] == {METRIC: "max", "train_seconds": "min"}
    assert list(found["infeasible"]) == ["t0004"]
    assert front_of(experiment(), {}) == []


values = st.integers(-2, 2).map(float)


@given(st.lists(st.tuples(values, values), max_size=12))
def test_no_point_of_the_front_is_beaten_and_every_other_one_is(points):
    rows = [{"a": a, "b": b} for a, b in points]
    front = pareto_front(rows, {"a": "max", "b": "min"})

    def beats(one, other):
        return one != other and one["a"] >= other["a"] and one["b"] <= other["b"]

    for place, row in enumerate(rows):
        assert (place in front) == (not any(beats(other, row) for other in rows))


def test_a_point_that_is_no_number_is_not_in_the_front():
    rows = [{"a": 1.0, "b": float("nan")}, {"a": 0.0}, {"a": 0.0, "b": 1.0}]
    assert pareto_front(rows, {"a": "max", "b": "min"}) == [2]


def test_what_is_held_is_counted_over_resumes_without_the_gap():
    rows = [
        {"event": "proposed", "time": 100.0},
        {"event": "scored", "time": 160.0},
        {"event": "resumed", "time": 1000.0},
        {"event": "scored", "time": 1030.0},
    ]
    assert held_seconds(rows, 1040.0) == 60 + 30 + 10
    assert held_seconds(rows, 130.0) == 60 + 30  # the clock was set back


def test_a_budget_ends_where_it_is_used_up():
    train = {"gpus_per_worker": 1, "num_workers": 2, "batch_size": 8}
    sweep = {"num_executors": 2, "max_gpu_hours": 4, "max_cost": 3, "cost_per_gpu_hour": 1.5}
    config = experiment(train=train, sweep=sweep)
    rows = [{"event": "proposed", "time": 0.0}, {"event": "scored", "time": 1700.0}]
    assert cost(config, 3600) == 6
    assert Budget(config, rows).used_up() is None
    rows.append({"event": "scored", "time": 1801.0})
    assert Budget(config, rows).used_up() == "sweep.max_cost=3 is used up (3)"
    rows.append({"event": "scored", "time": 3601.0})
    assert Budget(config, rows).used_up() == "sweep.max_gpu_hours=4 is used up (4)"
    cpus = experiment(sweep={"max_cost": 1, "cost_per_cpu_hour": 2, "max_wall_time_s": 10})
    assert "max_wall_time_s=10" in str(Budget(cpus, rows).used_up())


def watched_search(folder, config):
    """What `Closing` needs of a session, and what it said."""
    said: list[str] = []
    return SimpleNamespace(
        experiment=config,
        folder=folder,
        ledger=Ledger(folder.ledger_file),
        states=replay(folder.ledger_file),
        monitor=SimpleNamespace(say=said.append),
    ), said


def write_answers(folder, trial_id, step, value, number=20):
    """Predictions of so many samples with the same score each."""
    place = folder.trial(trial_id).evaluation("select", step)
    place.mkdir(parents=True)
    names = [f"s{sample}" for sample in range(number)]
    columns = {"sample_id": names, "group_id": names}
    scores = {METRIC: [value] * number, METRIC + WEIGHT: [1.0] * number}
    pq.write_table(pa.table({**columns, **scores}), place / "predictions.parquet")


def stable_search(**sweep):
    return experiment(
        evaluation={"metrics": [METRIC], "num_bootstrap": 200},
        sweep={
            "num_trials": 9,
            "stop_when_stable": {"trials": 2},
            "search_space": RANKS,
            "scheduler": {"type": "asha", "grace_period": 30},
            **sweep,
        },
        train={"max_steps": 90},
    )


def test_a_search_whose_contenders_stay_the_same_ends_and_stays_ended(tmp_path):
    folder = SweepFolder(tmp_path)
    running, said = watched_search(folder, stable_search())
    closing = Closing(running)
    # The second and the third are as good as each other; the others are far behind.
    for number, value in enumerate((0.0, 1.0, 1.0, 0.0, 0.0)):
        assert closing.kind is None
        write_answers(folder, f"t{number:04d}", 90, value)
        ended = running.states[f"t{number:04d}"] = state(number, value, 1)
        closing.ended(ended)
    assert closing.kind == "stable" and closing.is_closed() and not closing.ends_trials()
    assert "over the last 2 ended trials the 2 that cannot be told from the best" in said[-1]
    rows = [(row["event"], row.get("same")) for row in events(folder.ledger_file)]
    same = ["t0001", "t0002"]
    assert rows == [
        *(("compared", entry) for entry in (["t0000"], ["t0001"], same, same, same)),
        ("closed", None),
    ]
    assert Closing(running).kind == "stable"


def test_failed_trials_scores_that_are_no_numbers_and_partial_scores_tell_no_stability(tmp_path):
    config = stable_search()
    shares = {"evaluation": config.evaluation.model_copy(update={"rung_samples": 0.5})}
    folder = SweepFolder(tmp_path)
    running, _ = watched_search(folder, config.model_copy(update=shares))
    closing = Closing(running)
    # Stopped early, on half of the samples; failed; no number; in training, and the best.
    rows = [
        ("stopped", 30, 0.5, 10),
        ("failed", 30, 0.9, 10),
        ("finished", 90, float("nan"), 20),
        ("finished", 90, 0.4, 20),
        (None, 90, 0.8, 20),
        ("stopped", 30, 0.9, 10),
    ]
    for number, (ended, step, value, samples) in enumerate(rows):
        name = f"t{number:04d}"
        write_answers(folder, name, step, value, samples)
        running.states[name] = state(number, value, 1, ended=ended, step=step)
        if ended is not None:
            closing.ended(running.states[name])
    compared = {r["trial_id"]: r["same"] for r in events(folder.ledger_file)}
    assert compared == {
        "t0000": ["t0000"],
        "t0002": ["t0000"],
        "t0003": ["t0003"],
        "t0005": ["t0004"],
    }
    assert closing.kind is None


@pytest.mark.parametrize("cut", [1, 2])
def test_a_kill_at_the_end_of_a_trial_changes_nothing_of_when_the_search_ends(tmp_path, cut):
    config, folder = stable_search(stop_when_stable={"trials": 1}), SweepFolder(tmp_path)
    running, _ = watched_search(folder, config)
    closing = Closing(running)
    for number, value in enumerate((1.0, 0.0)):
        name = f"t{number:04d}"
        write_answers(folder, name, 90, value)
        running.ledger.append("proposed", trial_id=name, number=number, recipe={})
        running.ledger.append("scored", trial_id=name, step=90, scores={METRIC: value})
        running.ledger.append("finished", trial_id=name, step=90)
        running.states.update(replay(folder.ledger_file))
        closing.ended(running.states[name])
    assert closing.kind == "stable"
    whole = events(folder.ledger_file)
    lines = folder.ledger_file.read_bytes().splitlines(keepends=True)
    folder.ledger_file.write_bytes(b"".join(lines[:-cut]))
    again, said = watched_search(folder, config)
    assert Closing(again).kind == "stable" and len(said) == 1

    def without_time(rows):
        return [{key: value for key, value in row.items() if key != "time"} for row in rows]

    assert without_time(events(folder.ledger_file)) == without_time(whole)


def test_stability_that_comes_too_late_to_save_anything_is_noted():
    halving = {"type": "halving", "grace_period": 10}
    (note,) = stable_search(scheduler=halving).sweep.notes()
    assert "no trial ends before all num_trials=9 have begun" in note
    assert not stable_search(scheduler={**halving, "min_results": 4}).sweep.notes()
    assert stable_search(scheduler={**halving, "min_results": 4}, num_executors=6).sweep.notes()
    assert not stable_search().sweep.notes()


def test_the_planner_tells_steps_with_and_without_stopping():
    asha = {"type": "asha", "grace_period": 10, "reduction_factor": 3}
    sweep = {"num_trials": 9, "num_executors": 2, "scheduler": asha, "search_space": RANKS}
    config = experiment(train={"max_steps": 90}, sweep={**sweep, "max_wall_time_s": 60})
    assert expected_steps(config) == pytest.approx(10 + 20 / 3 + 60 / 9)
    assert planner_line(config) == (
        "planner: 9 trials, 2 at once; 810 steps in all without early stopping, about 210 with it "
        "(3.9 times less, if 1/3 of each rung go on); ends at sweep.max_wall_time_s=60"
    )
    fifo = experiment(sweep={**sweep, "scheduler": {"type": "fifo"}}, train={"max_steps": 90})
    assert planner_line(fifo).endswith("810 steps in all without early stopping")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """An ended sweep's folder: experiment.json and ledger."""
    folder = tmp_path_factory.mktemp("earlier")
    config = sampled("random", num_trials=8)
    Sweep(folder, config).run()
    write_json(
        folder / "experiment.json",
        {"experiment": config.model_dump(mode="json"), "data": "digest"},
    )
    return folder


def warm(config, tmp_path, digest="digest"):
    said: list = []
    file = SweepFolder(tmp_path).ledger_file
    return warm_trials(config, digest, Ledger(file), file, said.append), said


def test_a_sweep_starts_from_the_trials_of_another_one(earlier, tmp_path):
    config = sampled("tpe", warm_start=[str(earlier)])
    found, said = warm(config, tmp_path)
    assert len(found) == 7 and "7 trials of" in said[0] and "1 left out: 1 without a s" in said[0]
    assert isinstance(found[0], WarmTrial)
    again, nothing = warm(config, tmp_path)  # from the ledger now
    assert (again, nothing) == (found, [])
    sweep = Sweep(tmp_path, config, warm=found)
    warmed = sweep.run(most=4)
    assert warmed[1:] != Sweep(tmp_path / "cold", sampled("tpe")).run(most=4)[1:]
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [trial.user_attrs.get("sweep") for trial in study.trials][:8] == ["test"] * 7 + [None]
    rest = Sweep(tmp_path, config, warm=again).run()
    whole = Sweep(tmp_path / "whole", config, warm=found).run()
    assert dict(warmed + rest) == dict(whole)


def test_trials_outside_the_present_space_are_left_out_and_counted(earlier, tmp_path):
    fewer = {key: NUMBERS[key] for key in ("train.learning_rate", "lora.rank")}
    found, said = warm(
        sampled("tpe", warm_start=[str(earlier)], search_space=fewer), tmp_path / "fewer"
    )
    assert [entry.trial_id for entry in found] == ["t0000"]  # the default has our own dropout
    assert "with another lora.dropout than the experiment" in said[0]
    small = {**NUMBERS, "lora.rank": {"type": "choice", "values": [1, 2]}}
    found, said = warm(
        sampled("tpe", warm_start=[str(earlier)], search_space=small), tmp_path / "small"
    )
    assert "with another lora.rank than this space has" in said[0]


def test_clones_of_an_earlier_sweep_are_left_out(earlier, tmp_path):
    folder = tmp_path / "earlier"
    shutil.copytree(earlier, folder)
    parent = replay(folder / "ledger.jsonl")["t0000"]
    ledger, name = Ledger(folder / "ledger.jsonl"), "t0008"
    origin = {"parent": "t0000", "step": 1, "recipe": parent.recipe}
    clone = {"trial_id": name, "number": 8, "recipe": parent.recipe, "origin": origin}
    ledger.append("exploited", step=1, exploits=[{"replaces": "t0001", "clone": clone}])
    last = max(parent.scored)
    ledger.append("scored", trial_id=name, step=last, scores=parent.scored[last])
    ledger.append("finished", trial_id=name, step=last)
    found, said = warm(sampled("tpe", warm_start=[str(folder)]), tmp_path)
    assert len(found) == 7 and "1 made as a clone" in said[0]


def test_what_cannot_be_compared_is_refused(earlier, tmp_path):
    other = experiment(
        sweep={"warm_start": [str(earlier)], "search_space": NUMBERS},
        evaluation={"metrics": ["cer@micro"]},
    )
    with pytest.raises(ConfigError, match=r"was decided by exact_match@strip, this sweep is by c"):
        warm(other, tmp_path / "metric")
    config = sampled("tpe", warm_start=[str(earlier)])
    with pytest.raises(ConfigError, match=r"another data \(digest, here new\)"):
        warm(config, tmp_path / "data", "new")
    across = sampled("tpe", warm_start=[str(earlier)], warm_start_across_data=True)
    assert len(warm(across, tmp_path / "across", "new")[0]) == 7
    nothing = sampled("tpe", warm_start=[str(tmp_path)])
    with pytest.raises(ConfigError, match="is not a sweep folder"):
        warm(nothing, tmp_path / "none")


def test_a_warm_start_that_teaches_nothing_is_refused_before_anything_starts(earlier, tmp_path):
    config = sampled("tpe", warm_start=[str(earlier)])
    check_warm_start(config)
    check_warm_start(config, "digest")
    with pytest.raises(ConfigError, match="another data"):
        check_warm_start(config, "new")
    other = {"lora.alpha_ratio": {"type": "uniform", "lower": 3, "upper": 4}}
    strange = sampled("tpe", warm_start=[str(earlier)], search_space=other)
    with pytest.raises(
        ConfigError,
        match=r"no trial of .+ fits this sweep: 1 with another lora.alpha_ratio than this",
    ):
        check_warm_start(strange)

    folder = SweepFolder(shutil.copytree(earlier, tmp_path / "altered"))
    rows = [
        {key: value for key, value in row.items() if key not in ("seq", "time", "event")}
        | {"event": row["event"], **({"recipe": {"lora.rnk": 3}} if "recipe" in row else {})}
        for row in events(folder.ledger_file)
    ]
    folder.ledger_file.unlink()
    ledger = Ledger(folder.ledger_file)
    for row in rows:
        ledger.append(row.pop("event"), **row)
    altered = sampled("tpe", warm_start=[str(folder.root)])
    with pytest.raises(ConfigError, match="7 with a recipe that its own experiment does not"):
        check_warm_start(altered)
    folder.ledger_file.write_bytes(b"x\n" + folder.ledger_file.read_bytes())
    with pytest.raises(ConfigError, match=r"^sweep.warm_start: .+:1: the ledger is damaged"):
        check_warm_start(altered)
