"""Four bits: which layers, what is refused; a training step where there is a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.loading import load_base, meta_model
from raytune_vlm.models.location import check_model
from raytune_vlm.models.lora import attach, detach, target_modules
from raytune_vlm.models.quantization import kept_modules, quantization_options
from raytune_vlm.models.tiny import BUILDERS

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))
HERE = find_spec("bitsandbytes") is not None


@FAMILY
def test_the_language_model_s_linear_layers_are_quantised_and_no_others(model_type, tiny_model):
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = ModelConfig(name=str(tiny_model(model_type)))
    model, family = meta_model(config), check_model(config)
    pattern = kept_modules(model, family)
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    quantised = [name for name in linear if should_convert_module(name, [pattern])]
    assert quantised == target_modules(model, family, ("text",))["text"]


@pytest.mark.skipif(HERE, reason="bitsandbytes is installed")
def test_a_missing_package_is_told_before_the_start(tiny_model):
    with pytest.raises(ModelError, match=r"nf4 needs bitsandbytes: pip install"):
        check_model(ModelConfig(name=str(tiny_model("idefics3")), quantization="nf4"))


def test_a_cpu_is_refused(tiny_model):
    config = ModelConfig(name=str(tiny_model("idefics3")), quantization="nf4")
    plain = config.model_copy(update={"quantization": "none"})
    model, family = meta_model(plain), check_model(plain)
    with pytest.raises(ModelError, match="needs a GPU, and there is none"):
        quantization_options(config, model, family, "cpu")


@pytest.mark.skipif(not (HERE and torch.cuda.is_available()), reason="needs bitsandbytes and a GPU")
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_four_bits_learns_and_leaves_them_as_they_were(dora, tiny_model):
    config = ModelConfig(name=str(tiny_model("idefics3")), quantization="nf4", dtype="bfloat16")
    base = load_base(config, "cuda:0")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    model = attach(base.model, base.family, LoraConfig(rank=4, dora=dora), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens = torch.arange(1, 9, device="cuda:0")[None]
    losses = []
    for _ in range(4):
        logits = model(input_ids=tokens).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    base.model = detach(model)
    after = base.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
