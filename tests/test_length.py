"""The length of a run: steps or epochs, warm-up by steps or by share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from made import experiment

from raytune_vlm.config.loader import load_experiment, render
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ConfigError
from raytune_vlm.prepare.plan import Plan, PlanSpec, plan_spec, resolved_steps
from raytune_vlm.train.schedule import learning_rate

SPACE = {"train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-2}}


def plan_of(config, count=40, seed=0):
    lengths = np.random.default_rng(seed).integers(100, 1000, count)
    return Plan(lengths, np.zeros(count, np.int64), plan_spec(config), data_digest="d")


@pytest.mark.parametrize(
    ("epochs", "batch_size", "steps"),
    [(1, 8, 5), (1, 16, 3), (2.5, 8, 13), (0.1, 8, 1), (3, 40, 3), (0.7, 7, 4)],
)
def test_epochs_are_so_many_steps(epochs, batch_size, steps):
    config = experiment(train={"epochs": epochs, "batch_size": batch_size})
    plan = plan_of(config)
    assert resolved_steps(config, plan) == steps
    used = np.concatenate([plan.rows(step) for step in range(steps)])
    assert np.bincount(used, minlength=40).min() >= int(epochs)


def test_packs_are_counted_by_the_plan():
    config = experiment(train={"epochs": 2.5, "batch_size": 2, "pack_tokens": 2048})
    plan = plan_of(config)
    packs = [len(plan.epoch(number)) for number in range(3)]
    steps = resolved_steps(config, plan)
    assert steps == -(-int(np.ceil(packs[0] + packs[1] + packs[2] / 2)) // 2)
    alone = experiment(train={"epochs": 2.5, "batch_size": 2})
    assert steps < resolved_steps(alone, plan_of(alone))
    again = plan_of(config)
    again.rows(7)  # whatever was asked of it before
    assert resolved_steps(config, again) == steps


def test_without_epochs_the_steps_are_max_steps():
    config = experiment(train={"max_steps": 33})
    assert resolved_steps(config, plan_of(config)) == 33
    spec = PlanSpec(batch_size=4, seed=0)
    assert Plan(np.array([5]), np.zeros(1), spec, data_digest="d").num_steps(0.5) == 1


def test_the_warm_up_may_be_a_share():
    shared = TrainConfig(max_steps=60, warmup_share=0.1, learning_rate=0.5)
    plain = TrainConfig(max_steps=60, warmup_steps=6, learning_rate=0.5)
    rates = [[learning_rate(config, step) for step in range(60)] for config in (shared, plain)]
    assert rates[0] == rates[1]


def written(folder: Path, **sections: object) -> Path:
    plain = {
        "name": "x",
        "data": {"sources": [{"type": "messages", "path": "train.jsonl"}]},
        **sections,
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return folder / "x.yaml"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"epochs": 2, "max_steps": 200},
            r"x\.yaml:\d+: train\.max_steps: is not used when epochs",
        ),
        ({"epochs": 2, "max_steps": 90}, "epochs=2 and max_steps=90 exclude each other"),
        ({"warmup_share": 0.1, "warmup_steps": 10}, r"train\.warmup_steps: is not used when warm"),
        ({"warmup_share": 0.1, "warmup_steps": 3}, "warmup_share=0.1 and warmup_steps=3 exclude"),
        ({"warmup_share": 1.0}, "less than 1"),
        ({"epochs": 0}, "greater than 0"),
    ],
)
def test_what_contradicts_itself_is_refused(train, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_experiment(written(tmp_path, train=train))


def test_trials_of_different_batches_are_not_compared_by_epochs():
    space = {"train.batch_size": {"type": "choice", "values": [8, 16]}}
    with pytest.raises(ValueError, match=r"epochs=2 and sweep\.search_space\.train\.batch_size"):
        experiment(train={"epochs": 2}, sweep={"search_space": space})


def test_an_experiment_by_epochs_is_read_back_as_it_was(tmp_path):
    file = written(
        tmp_path, train={"epochs": 3, "warmup_share": 0.05}, sweep={"search_space": SPACE}
    )
    read = load_experiment(file)
    (tmp_path / "again.yaml").write_text(render(read))
    assert load_experiment(tmp_path / "again.yaml") == read
    resolved = read.with_recipe({"train.epochs": None, "train.max_steps": 500})
    assert resolved.rungs[-1] == 500 and resolved.train.warmup == 25
