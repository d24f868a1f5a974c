"""Model FLOPs of a frozen base with adapters, and the peaks that they are held against."""

from __future__ import annotations

import pytest
import torch
from made import experiment

from raytune_vlm.models.lora import attach, detach, scope_of
from raytune_vlm.train.flops import FlopCounter, peak_flops


def weights_of(model, family, scope):
    """Of linear layers by hand: those of the base, those of adapters, the output layer."""
    found = {"base": 0, "adapter": 0, "head": 0}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (scope_of(name, family) or "text") == scope:
            kind = "head" if name.endswith("lm_head") else "base"
            found["adapter" if "lora_" in name else kind] += module.weight.numel()
    return found


@pytest.mark.parametrize("scope", ["text", "text+vision"])
def test_weights_are_counted_by_what_a_gradient_passes(scope, tiny_base):
    base = tiny_base("idefics3")
    before = sum(len(module._forward_pre_hooks) for module in base.model.modules())
    model = attach(base.model, base.family, experiment(lora={"scope": scope}).lora, seed=0)
    counter = FlopCounter(model, base.family)
    try:
        text, vision = (weights_of(model, base.family, name) for name in ("text", "vision"))

        def flops(**counts):
            names = ("tokens", "squares", "vision_rows", "projector_rows", "labelled")
            return counter.flops(**{**dict.fromkeys(names, 0), **counts})

        assert flops(tokens=1) == 4 * text["base"] + 6 * text["adapter"]
        assert flops(labelled=1) == 4 * text["head"] > 0
        tower = flops(vision_rows=1)
        trained = "vision" in scope
        assert tower == (4 if trained else 2) * vision["base"] + 6 * vision["adapter"]
        config = base.model.config.text_config
        attention = flops(squares=100)
        assert attention == 12 * config.num_hidden_layers * config.hidden_size * 100
    finally:
        counter.close()
        base.model = detach(model)
    assert sum(len(module._forward_pre_hooks) for module in base.model.modules()) == before


def test_a_device_is_known_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
