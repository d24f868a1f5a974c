"""Families, LoRA scopes, loading errors."""

from __future__ import annotations

import pytest
import torch
from made import experiment

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.loading import check_model
from raytune_vlm.models.lora import attach, detach, scope_of, trainable_by_scope
from raytune_vlm.models.tiny import BUILDERS, write_tiny_model

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))


@FAMILY
@pytest.mark.parametrize("scope", ["text", "projector", "vision"])
def test_a_scope_gets_adapters_and_nothing_else_does(model_type, scope, tiny_base):
    base = tiny_base(model_type)
    config = LoraConfig(rank=2, scope=scope)
    if scope in base.family.no_linear:
        with pytest.raises(ModelError, match="no linear layer"):
            attach(base.model, base.family, config, seed=0)
        return
    adapted = attach(base.model, base.family, config, seed=0)
    try:
        assert set(trainable_by_scope(adapted, base.family)) == {scope}
    finally:
        base.model = detach(adapted)


@FAMILY
def test_every_parameter_but_the_head_lies_in_one_scope(model_type, tiny_base):
    base = tiny_base(model_type)
    outside = [
        name
        for name, _ in base.model.named_parameters()
        if scope_of(name, base.family) is None and "lm_head" not in name
    ]
    assert outside == []


@FAMILY
def test_attach_depends_on_the_seed_only_and_unload_restores(model_type, tiny_base):
    base = tiny_base(model_type)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 40)
        adapted = attach(base.model, base.family, LoraConfig(rank=2), seed=seed)
        drawn.append([p.detach().clone() for p in adapted.parameters() if p.requires_grad])
        base.model = detach(adapted)
    same = [torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True)]
    other = [torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True)]
    assert all(same) and not all(other)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@FAMILY
def test_check_model_needs_the_config_file_only(model_type, tiny_model):
    assert check_model(ModelConfig(name=str(tiny_model(model_type)))) is FAMILIES[model_type]


def test_a_search_over_a_scope_without_linear_layers_is_refused_before_the_start(tiny_model):
    space = {"lora.scope": {"type": "choice", "values": ["text", "text+projector"]}}
    searched = experiment(
        tiny_model("gemma3"), sweep={"search_space": space, "scheduler": {"type": "fifo"}}
    )
    with pytest.raises(ModelError, match="'projector' holds no linear layer in gemma3; use text"):
        check_model(searched.model).check_scopes(searched.lora_scopes())


def test_unknown_models_are_named_with_the_nearest(tmp_path, tiny_model):
    with pytest.raises(ModelError, match=r"'dmeo'.*did you mean 'demo'"):
        check_model(ModelConfig(name="dmeo"))
    folder = tiny_model("idefics3")
    with pytest.raises(ModelError, match=f"did you mean '{folder}'"):
        check_model(ModelConfig(name=str(folder.parent / "idefix3")))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_v"}')
    with pytest.raises(ModelError, match=r"'qwen2_5_v' \(did you mean 'qwen2_5_vl'"):
        check_model(ModelConfig(name=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        check_model(ModelConfig(name=str(tmp_path)))


def test_a_tiny_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KeyError, match="did you mean 'idefics3'"):
        write_tiny_model("idefics", tmp_path)


def test_the_scope_is_written_in_one_order():
    assert LoraConfig(scope="vision+text").scope == "text+vision"
