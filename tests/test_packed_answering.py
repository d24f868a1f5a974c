"""Slots that are asked side by side answer as each does by itself."""

from __future__ import annotations

import pytest
import torch
from made import experiment

from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.packed.answering import answer_side_by_side
from raytune_vlm.packed.slot import Slot
from raytune_vlm.train.batches import TrainingData
from raytune_vlm.train.run import Run
from raytune_vlm.train.world import World

RECIPES = {
    "small": {"lora.rank": 2},
    "large": {"lora.rank": 8, "lora.alpha": 32.0, "lora.rslora": True, "lora.dropout": 0.5},
    "pissa": {"lora.rank": 4, "lora.init": "pissa"},
}
ROWS = {"small": [3, 0, 11, 20], "large": [11, 5], "pissa": [0, 3, 7]}
CONFIG = EvaluationConfig(max_new_tokens=5, batch_size=4)


@pytest.fixture
def make_slots(tiny_base, tiny_split):
    """Makes slots whose adapters have an effect, and takes them off in the end."""
    opened = []

    def slots(model_type, names=tuple(RECIPES)):
        train = {"max_steps": 4, "warmup_steps": 0, "batch_size": 2}
        for number, name in enumerate(names):
            config = experiment(train=train).with_recipe(RECIPES[name])
            data = TrainingData("d")
            run = Run(tiny_base(model_type), tiny_split(model_type), config, World(), data)
            opened.append(Slot(run, "cpu"))
            torch.manual_seed(number)
            for parameter in opened[-1].trained:
                parameter.data += 0.05 * torch.randn_like(parameter)
        return dict(zip(names, opened, strict=True))

    yield slots
    for slot in opened:
        slot.close()


def layers(slots):
    return {name: slot.layers for name, slot in slots.items()}


@pytest.mark.parametrize("model_type", ["idefics3", "vision-encoder-decoder"])
def test_unlike_slots_answer_as_by_themselves(model_type, make_slots, tiny_base, tiny_prompts):
    base, split = tiny_base(model_type), tiny_prompts(model_type)
    slots = make_slots(model_type)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    kept = {name: [] for name in slots}
    batches = []
    found = answer_side_by_side(
        base,
        layers(slots),
        split,
        ROWS,
        CONFIG,
        keep_going=lambda done: not batches.append(done),
        keep=lambda name, answers: kept[name].extend(answers),
    )
    for name, slot in slots.items():
        with slot.mounted() as run:
            assert found[name] == generate(run.model, base, split, ROWS[name], CONFIG)
        assert sorted(kept[name], key=str) == sorted(found[name], key=str)
    if base.family.left_padding:
        assert batches == [0, 4, 8]  # one by one it would be a batch for each slot
    assert len({entry.text for own in found.values() for entry in own}) >= 3
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    stopped = answer_side_by_side(
        base, layers(slots), split, ROWS, CONFIG, keep_going=lambda done: False
    )
    assert stopped is None


def test_a_family_whose_rows_are_not_samples_is_refused(make_slots, tiny_base, tiny_prompts):
    slots = make_slots("mllama", ("small", "large"))
    with pytest.raises(ModelError, match="for a batch of 4 rows"):
        answer_side_by_side(
            tiny_base("mllama"), layers(slots), tiny_prompts("mllama"), ROWS, CONFIG
        )
