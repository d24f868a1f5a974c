"""Control by hand: what is answered, what the ledger makes of it, and the rank of a clone."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from made import experiment

from raytune_vlm.cli import cli
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.errors import ConfigError
from raytune_vlm.models.adapter_file import save_adapter, weights_as_saved
from raytune_vlm.models.adapter_start import resized, start_from
from raytune_vlm.models.lora import attach, detach, lora_layers
from raytune_vlm.records import SweepFolder, write_json
from raytune_vlm.sweep.asking import ask, trial_lines
from raytune_vlm.sweep.board import IDLE, BoardState
from raytune_vlm.sweep.control import Request, Situation, answer, ending_of, limits_by_hand
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.ledger import Ledger, TrialState, apply_control, replay
from raytune_vlm.sweep.scheduler import Rule, decide
from raytune_vlm.sweep.searcher import OptunaSearcher

METRIC = "exact_match@strip"
SPACE = {
    "lora.rank": {"type": "choice", "values": [2, 4]},
    "train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
}


def config(**sweep):
    scheduler = {"type": "halving", "grace_period": 2, "reduction_factor": 2}
    plain = {"num_trials": 4, "search_space": SPACE, "scheduler": scheduler, **sweep}
    return experiment(train={"max_steps": 8, "warmup_steps": 1}, sweep=plain)


def trials(**changes):
    """t0000 has finished, t0001 waits at its first rung, t0002 is training."""
    recipe = {"lora.rank": 4, "train.learning_rate": 1e-2}
    found = {
        "t0000": TrialState("t0000", 0, recipe, {s: {METRIC: 0.5} for s in (2, 4, 8)}, "finished"),
        "t0001": TrialState("t0001", 1, recipe, {2: {METRIC: 0.4}}),
        "t0002": TrialState("t0002", 2, recipe),
    }
    for trial_id, fields in changes.items():
        found[trial_id] = replace(found[trial_id], **fields)
    return found


def told(command, trial_id=None, *, states=None, closed=None, sweep=(), **values):
    values = {key.replace("__", "."): value for key, value in values.items()}
    now = Situation(config(**dict(sweep)), states or trials(), closed)
    return answer(Request(command, trial_id, values), now)


@pytest.mark.parametrize(
    ("command", "trial_id", "values", "options", "reason"),
    [
        ("stop", "t0010", {}, {}, "no trial 't0010' (did you mean 't000"),
        ("stop", "t0000", {}, {}, "t0000 has ended already (finished)"),
        ("pause", "t0001", {}, {"states": trials(t0001={"held": True})}, "paused by hand already"),
        ("resume", "t0001", {}, {}, "is not paused by hand"),
        ("pin", "t0001", {}, {"states": trials(t0001={"pinned": True})}, "pinned already"),
        ("pin", "t0001", {}, {"sweep": {"scheduler": {"type": "fifo"}}}, "pin has no effect"),
        ("unpin", "t0001", {}, {}, "is not pinned"),
        ("clone", "t0002", {"lora__rank": 2}, {}, "has not been scored at any rung yet"),
        ("clone", "t0001", {"lora__rang": 2}, {}, "did you mean 'lora.rank'?"),
        ("clone", "t0001", {"lora__rank": 3}, {}, "one of [2, 4]"),
        ("clone", "t0001", {"lora__rank": 4}, {}, "nothing changes"),
        ("clone", "t0001", {"train__learning_rate": 1.0}, {}, "from 0.0001 to 0.1"),
        ("clone", "t0001", {"lora__scope": "vision"}, {}, "cannot have another lora.scope"),
        ("set-budget", None, {"max_trials": 3}, {}, "'num_trials'"),
        ("set-budget", None, {"num_trials": 0}, {}, "greater than or equal to 1"),
        ("set-budget", None, {"max_gpu_hours": 1}, {}, "train.gpus_per_worker=0"),
        ("extend", None, {"max_wall_time_s": 60}, {}, "is not limited"),
        ("extend", None, {"num_trials": -1}, {}, "must be a number above 0"),
        ("extend", None, {"num_trials": 2}, {"closed": "stable"}, "no new trials any more"),
        ("drain", None, {}, {"closed": "stable"}, "no new trials already (stable)"),
        ("drain", None, {}, {"states": {"t0": TrialState("t0", 0, {}, {}, "failed")}}, "conclude"),
        ("stop", None, {}, {"closed": "budget"}, "being ended already"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(command, trial_id, values, options, reason):
    with pytest.raises(ConfigError) as error:
        told(command, trial_id, **values, **options)
    assert reason in error.value.message and "\n" not in error.value.message


def test_a_clone_starts_at_the_last_rung_that_leaves_something_to_train():
    found = told("clone", "t0000", lora__rank=2)
    clone = found.effect["clone"]
    assert clone["trial_id"] == "t0003" and clone["origin"]["step"] == 4
    assert clone["promoted_to"] == 8 and clone["recipe"]["train.learning_rate"] == 1e-2
    assert "rank of text 4 -> 2 by truncated SVD" in found.message
    assert "fresh optimizer" in found.message


def test_the_ledger_alone_says_who_is_held_pinned_stopped_and_cloned(tmp_path):
    file, ours = tmp_path / "ledger.jsonl", {}
    ledger = Ledger(file)
    for state in trials().values():
        ledger.append("proposed", trial_id=state.trial_id, number=state.number, recipe=state.recipe)
        ours[state.trial_id] = TrialState(state.trial_id, state.number, state.recipe)
        for step, scores in state.scored.items():
            ledger.append("scored", trial_id=state.trial_id, step=step, scores=scores)
            ours[state.trial_id].scored[step] = scores
    for command, trial_id, values in (
        ("pause", "t0001", {}),
        ("pin", "t0002", {}),
        ("clone", "t0001", {"lora.rank": 2}),
        ("resume", "t0001", {}),
        ("stop", "t0000", {}),
        ("pause", "t0002", {}),
        ("extend", None, {"num_trials": 3}),
        ("drain", None, {}),
    ):
        request = Request(command, trial_id, values)
        found = answer(request, Situation(config(), ours))
        row = {"command": command, "trial_id": trial_id, "accepted": True, **found.effect}
        apply_control(ours, {"seq": ledger.append("control", **row), **row})
    refused = {"command": "pause", "trial_id": "t0001", "accepted": False}
    ledger.append("control", **refused)
    known = replay(file)
    for trial_id, state in ours.items():
        for name in ("held", "pinned", "stop_asked", "origin", "promoted_to", "recipe"):
            assert getattr(known[trial_id], name) == getattr(state, name)
    assert known["t0003"].origin["parent"] == "t0001" and not known["t0001"].held
    assert known["t0002"].held and known["t0002"].pinned and known["t0000"].stop_asked
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert limits_by_hand(rows) == {"num_trials": 7}
    assert [kind for row in rows if (kind := ending_of(row))] == ["drained"]


def test_a_pinned_trial_goes_on_first_and_a_held_one_not_at_all():
    rule = Rule((2, 4, 8), 2, 1, 4, 2, METRIC, "max")
    states = {
        name: TrialState(name, number, {}, {2: {METRIC: value}})
        for number, (name, value) in enumerate({"a": 0.9, "b": 0.5, "c": 0.1, "d": 0.2}.items())
    }
    assert decide(states.values(), rule).trial_id == "a"
    states["a"].held = True
    assert decide(states.values(), rule).trial_id == "b", "a keeps its place among the best two"
    states["c"].pinned = True
    assert decide(states.values(), rule).trial_id == "c"
    states["c"].promoted_to, states["b"].promoted_to = 4, 4
    assert decide(states.values(), rule).kind == "wait"


def test_clones_take_no_proposal_and_are_told_to_the_file_only(tmp_path):
    import optuna

    proposals = []
    for with_clone in (False, True):
        folder = tmp_path / str(with_clone)
        ledger, states = Ledger(folder / "ledger.jsonl"), {}
        points = [{"lora.rank": rank, "train.learning_rate": 1e-3} for rank in (4, 2)]
        options = {"points_to_evaluate": points, "include_default": False}
        searcher = OptunaSearcher(config(**options), ledger, states, folder / "study.db", None)
        found = [searcher.suggest("a")["recipe"]]
        states["t0000"].scored[2] = {METRIC: 0.4}
        if with_clone:
            given = answer(
                Request("clone", "t0000", {"train.learning_rate": 0.05}),
                Situation(config(), states),
            ).effect
            row = {"command": "clone", "trial_id": "t0000", "accepted": True, **given}
            apply_control(states, {"seq": ledger.append("control", **row), **row})
            searcher.add(states["t0001"])
            assert searcher.suggest("b")["origin"]["parent"] == "t0000"
            states["t0001"].ended = "stopped"
            searcher.tell(states["t0001"])
            study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder}/study.db")
            assert study.trials[0].user_attrs["parent"] == "t0000 at 2"
        found += [searcher.suggest(name)["recipe"] for name in "cde"]
        assert searcher.is_done
        proposals.append(found)
    assert proposals[0] == proposals[1] and proposals[0][1]["lora.rank"] == 2


def test_no_one_trains_a_paused_job_and_never_two_the_same():
    job = Job("t0000", "trial", "t0000", {})

    async def scene():
        board = BoardState(["a", "b"], 1)
        await board.submit(job)
        assert await board.take("a") == job
        await board.pause("t0000")
        assert await board.push("a", "t0000", {}) == "pause"
        await board.submit(job)  # its proxy was only starting
        await board.finish("a", "t0000")
        assert await board.take("b", 0.01) == IDLE
        await board.unpause("t0000")
        await board.submit(job)
        assert await board.take("b") == job
        await board.submit(replace(job, until=4))
        assert await board.take("a", 0.01) == IDLE, "b has it still"
        await board.finish("b", "t0000")
        assert await board.take("a") == replace(job, until=4)
        await board.stop("t0000")
        await board.submit(job)
        assert await board.take("b", 0.01) == IDLE

    asyncio.run(scene())


@pytest.mark.parametrize(("rank", "new"), [(4, 7), (4, 4), (7, 4), (3, 1)])
def test_another_rank_keeps_the_product_or_its_best_approximation(rank, new):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, 11), (13, rank)))
    fresh = torch.randn((new, 11), generator=generator)
    other_a, other_b = resized(a, b, fresh)
    assert other_a.shape == (new, 11) and other_b.shape == (13, new)
    product = (b.double() @ a.double()).numpy()
    if new >= rank:
        assert torch.equal(other_b[:, :rank], b) and torch.equal(other_a[:rank], a)
        assert not other_b[:, rank:].any() and torch.equal(other_a[rank:], fresh[rank:])
        found = (other_b.double() @ other_a.double()).numpy()
        assert np.array_equal(found, product)
        return
    u, singular, vh = np.linalg.svd(product)
    best = u[:, :new] * singular[:new] @ vh[:new]
    assert np.allclose(other_b.numpy() @ other_a.numpy(), best, atol=1e-5)
    error = np.linalg.norm(product - other_b.double().numpy() @ other_a.double().numpy())
    assert error == pytest.approx(np.linalg.norm(singular[new:]), rel=1e-5)
    doubled = resized(a, b, fresh, scale=2.0)
    assert np.allclose(doubled[1].numpy() @ doubled[0].numpy(), 2 * best, atol=1e-5)


def test_a_model_starts_as_its_parent_was_whatever_rank_and_alpha(tiny_base, tmp_path):
    base = tiny_base("idefics3")
    before = LoraConfig(rank=4, alpha=8, scope="text+vision")

    def product(layer):
        weights = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
        return layer.scaling["default"] * weights[0].double() @ weights[1].double()

    model = attach(base.model, base.family, before, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path)
    wanted = {name: product(layer).detach() for name, layer in lora_layers(model).items()}
    base.model = detach(model)
    for now in (LoraConfig(rank=6, alpha=3, scope="text+vision"), before.model_copy()):
        model = attach(base.model, base.family, now, seed=2)
        told = start_from(tmp_path, model, base.family, before, now)
        for name, layer in lora_layers(model).items():
            assert torch.allclose(product(layer), wanted[name], atol=1e-6)
        base.model = detach(model)
        assert len(told) == (2 if now.rank == 6 else 0)
    now = LoraConfig(rank=2, scope="text+vision")
    model = attach(base.model, base.family, now, seed=2)
    told = start_from(tmp_path, model, base.family, before, now)
    weights = weights_as_saved(model)
    assert {weights[name].shape[0] for name in weights if "lora_A" in name} == {2}
    base.model = detach(model)
    assert "rank of text 4 -> 2 by truncated SVD, which keeps" in told[0]


@pytest.fixture
def driven(tmp_path):
    """A folder with a lease of a living process (this one's parent) and two trials."""
    folder = SweepFolder(tmp_path / "sweep")
    write_json(folder.experiment_file, {"experiment": {}})
    ledger = Ledger(folder.ledger_file)
    for number in range(2):
        ledger.append("proposed", trial_id=f"t000{number}", number=number, recipe={})
        ledger.append("started", trial_id=f"t000{number}")
    held = {"host": socket.gethostname(), "pid": os.getppid(), "fence": 1, "renewed": time.time()}
    write_json(folder.lease_file, held)
    return folder, ledger


def test_the_command_line_waits_for_the_answer_in_the_ledger(driven):
    folder, ledger = driven

    def drive():
        for number in range(2):
            while not (files := list(folder.control.glob("*.json"))):
                time.sleep(0.01)
            request = json.loads(files[0].read_text())
            files[0].unlink()
            fields = {"command": request["command"], "trial_id": request["trial_id"]}
            fields |= {"request": request["request_id"], "accepted": number == 0}
            ledger.append("control", message="so it is", **fields)

    thread = threading.Thread(target=drive)
    thread.start()
    assert ask(folder, Request("pause", "t0001")) == "so it is"
    with pytest.raises(ConfigError, match="refused: so it is"):
        ask(folder, Request("pause", "t0000"))
    thread.join()
    assert trial_lines(folder) == ["t0000  running", "t0001  paused by hand"]
    with pytest.raises(ConfigError, match="did not take the request within 0 s"):
        ask(folder, Request("drain"), within_s=0.0)
    assert not list(folder.control.iterdir()), "what was withdrawn is not done later"


def test_without_a_driver_or_a_sweep_a_request_is_refused(driven, tmp_path):
    folder, _ = driven

    def refusal(*words):
        return CliRunner().invoke(cli, ["control", *map(str, words)]).exception.message

    assert "is not a sweep folder" in refusal(tmp_path, "drain")
    assert "must be dotted.key=value" in refusal(folder.root, "clone", "t0000", "rank")
    assert "given twice" in refusal(folder.root, "extend", "num_trials=1", "num_trials=2")
    folder.lease_file.unlink()
    assert f"`raytune-vlm resume {folder.root}`" in refusal(folder.root, "stop", "t0000")
    folder.result_file.write_text("{}")
    assert "has ended" in refusal(folder.root, "stop", "t0000")
