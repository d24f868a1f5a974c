"""What vLLM does with adapters: the tables, and real adapters of tiny models held against them."""

from __future__ import annotations

import pytest
from peft import get_peft_model_state_dict

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.models.serving import MAX_RANKS, NOT_SERVED, SERVED, check_names
from raytune_vlm.models.tiny import BUILDERS

LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
PROJECTOR = "base_model.model.model.multi_modal_projector.linear_1.lora_A.weight"


@pytest.fixture
def tensors(tiny_base):
    """Family, scope -> the names of a real adapter's tensors."""

    def names(model_type, scope):
        base = tiny_base(model_type)
        adapted = attach(base.model, base.family, LoraConfig(rank=2, scope=scope), seed=0)
        try:
            return list(get_peft_model_state_dict(adapted))
        finally:
            base.model = detach(adapted)

    return names


def test_every_family_is_served_or_said_not_to_be():
    assert set(FAMILIES) <= set(SERVED) | set(NOT_SERVED)
    assert not set(SERVED) & set(NOT_SERVED)


@pytest.mark.parametrize("model_type", sorted(set(BUILDERS) & set(SERVED)))
def test_an_adapter_of_the_language_model_maps_in_every_family_that_is_served(model_type, tensors):
    verdict = check_names({"r": 16}, tensors(model_type, "text"), model_type)
    assert verdict.problems == ()
    assert verdict.options == ("--enable-lora", "--max-lora-rank 16")


@pytest.mark.parametrize("model_type", ["idefics3", "qwen2_5_vl"])
def test_tower_and_projector_map_where_vllm_adapts_them(model_type, tensors):
    verdict = check_names({"r": 8}, tensors(model_type, "text+projector+vision"), model_type)
    assert verdict.problems == ()
    assert verdict.options[-1] == "--enable-tower-connector-lora"


def test_tensors_that_would_be_left_out_without_a_word_are_named(tensors):
    (problem,) = check_names({"r": 8}, tensors("gemma3", "text+vision"), "gemma3").problems
    assert "12 of 26 adapted modules have no counterpart" in problem
    assert "(there vision_tower.encoder.layers.0." in problem
    (problem,) = check_names({"r": 8}, [LAYER, PROJECTOR], "internvl").problems
    assert "1 of 2 adapted modules" in problem and "adapts the language model only" in problem
    assert check_names({"r": 8}, [LAYER, PROJECTOR], "llava").problems == ()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "vLLM has no DoRA"),
        ({"modules_to_save": ["model.multi_modal_projector"]}, "(modules_to_save)"),
        ({"lora_bias": True}, "biases in the adapter"),
        ({"bias": "all"}, "no trained biases (bias='all')"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"r": 600}, "rank 600 is above 512"),
        ({"rank_pattern": {"mlp": 1024}}, "rank 1024 is above 512"),
    ],
)
def test_what_vllm_refuses_is_named(config, said):
    verdict = check_names({"r": 8, **config}, [LAYER], "qwen2_5_vl")
    assert len(verdict.problems) == 1 and said in verdict.problems[0]
    assert verdict.options == ()


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (24, 32), (300, 320), (512, 512)])
def test_a_rank_between_two_sizes_needs_the_next_larger(rank, allowed):
    verdict = check_names({"r": rank}, [LAYER], "qwen2_5_vl")
    assert f"--max-lora-rank {allowed}" in verdict.options and allowed in MAX_RANKS


def test_families_that_vllm_does_not_serve_say_why():
    (problem,) = check_names({"r": 8}, [LAYER], "mllama").problems
    assert "serves no mllama adapter: the architecture was removed" in problem
    assert "not in the table" in check_names({"r": 8}, [LAYER], "llama").problems[0]
