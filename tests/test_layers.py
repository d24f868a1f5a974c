"""Recomputed activations: the same results, and nothing left of them."""

from __future__ import annotations

import pytest
import torch
from made import experiment

from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

TRAIN = {"max_steps": 12, "warmup_steps": 2, "batch_size": 4, "micro_batch_size": 4}


def trained(base, split, lora, **train):
    """Losses and weights of three steps."""
    config = experiment(lora={"rank": 4, **lora}, train={**TRAIN, **train})
    run = Run(base, split, config, World(), TrainingData("d"))
    try:
        losses = [run.step().loss for _ in range(3)]
        weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        return losses, {name: value for name, value in weights.items() if "lora_" in name}
    finally:
        run.close()


def state_of(model):
    """What a module is beside its parameters."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    return {
        name: {key: vars(module).get(key, "absent") for key in names}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "idefics3", "llava"])
def test_recomputed_activations_change_nothing(model_type, tiny_base, tiny_split):
    base, split = tiny_base(model_type), tiny_split(model_type)
    lora = {"scope": "text+vision", "dropout": 0.2}
    before = state_of(base.model)
    losses, weights = trained(base, split, lora)
    both = {"text": True, "vision": True}
    found, recomputed = trained(base, split, lora, activation_checkpointing=both)
    assert found == losses
    assert all(torch.equal(weights[name], value) for name, value in recomputed.items())
    assert state_of(base.model) == before


def test_each_scope_is_recomputed_for_itself(tiny_base, tiny_split):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    linear = {
        "text": base.model.model.text_model.layers[0].mlp.up_proj,
        "vision": base.model.model.vision_model.encoder.layers[0].mlp.fc1,
    }
    for wanted in ("text", "vision"):
        calls = {}
        config = experiment(
            lora={"rank": 2, "scope": "text+vision"},
            train={**TRAIN, "activation_checkpointing": {wanted: True}},
        )
        run = Run(base, split, config, World(), TrainingData("d"))
        try:
            run.step()  # the audit makes passes of its own
            hooks = []
            for scope, module in linear.items():
                calls[scope] = []
                note = calls[scope].append
                hooks.append(module.register_forward_hook(lambda *_, note=note: note(1)))
            run.step()
        finally:
            for hook in hooks:
                hook.remove()
            run.close()
        assert {scope: len(entries) for scope, entries in calls.items()} == {
            scope: 1 + (scope == wanted) for scope in linear
        }


def test_what_would_have_no_effect_is_refused():
    section = {"activation_checkpointing": {"vision": True}}
    with pytest.raises(ValueError, match=r"vision=true has no effect: nothing of the vision tower"):
        experiment(train=section)
    assert experiment(train=section, lora={"scope": "text+vision"})
    assert experiment(train=section, lora={"modules_to_save": "vision"})


def test_it_does_not_change_the_fingerprint():
    plain = experiment()
    changed = experiment(train={"activation_checkpointing": {"text": True}})
    assert changed.fingerprint() == plain.fingerprint()
