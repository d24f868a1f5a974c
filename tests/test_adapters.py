"""Several adapters in one batch answer as each does alone."""

from __future__ import annotations

import pytest
import torch
from made import experiment

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.evaluate.adapters import Adapter, generate_many, loaded
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.models.adapter_file import load_adapter, save_adapter
from raytune_vlm.models.lora import attach, detach

RECIPES = {
    "small": {"rank": 2},
    "large": {"rank": 8, "alpha": 32, "rslora": True},
    "pissa": {"rank": 4, "init": "pissa"},
    "dora": {"rank": 4, "dora": True},
    "towers": {"rank": 4, "scope": "text+vision"},
    "full": {"rank": 2, "modules_to_save": "projector"},
}
CONFIG = EvaluationConfig(max_new_tokens=5, batch_size=4)


def adapters_of(base, folder, names):
    """Adapters with an effect, as checkpoints hold them."""
    made = {}
    for number, name in enumerate(names):
        recipe = experiment(lora=RECIPES[name]).lora
        model = attach(base.model, base.family, recipe, seed=number)
        torch.manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        save_adapter(model, folder / name)
        base.model = detach(model)
        made[name] = Adapter(folder / name, recipe, number)
    return made


def alone(base, adapter, ask):
    if adapter is None:
        return ask(base.model)
    model = attach(base.model, base.family, adapter.recipe, seed=adapter.seed)
    try:
        load_adapter(adapter.folder, model)
        return ask(model.eval())
    finally:
        base.model = detach(model)


@pytest.mark.parametrize("model_type", ["idefics3", "qwen2_5_vl"])
def test_adapters_in_one_batch_answer_as_alone(model_type, tiny_base, tiny_prompts, tmp_path):
    base, split = tiny_base(model_type), tiny_prompts(model_type)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    adapters = {"base": None, **adapters_of(base, tmp_path, RECIPES)}
    rows = [3, 0, 11]
    found = generate_many(base, adapters, split, dict.fromkeys(adapters, rows), CONFIG)
    assert set(found.one_by_one) == {"dora", "towers", "full"}
    for name, adapter in adapters.items():
        expected = alone(base, adapter, lambda model: generate(model, base, split, rows, CONFIG))
        assert found.by_name[name] == expected
    texts = {tuple(x.text for x in answers) for answers in found.by_name.values()}
    assert len(texts) > 3
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_logits_in_one_batch_are_those_alone(tiny_base, tiny_prompts, tmp_path):
    base, split = tiny_base("idefics3"), tiny_prompts("idefics3")
    adapters = {"base": None, **adapters_of(base, tmp_path, ["small", "large", "pissa"])}
    pixels = PixelTable(base.processor.image_processor, base.family)

    def batch(count):
        samples = [split.encoded(7)] * count
        made = collate(samples, base.family, pad_token_id=base.processor.tokenizer.pad_token_id)
        del made["labels"]
        return pixels(made)

    with loaded(base, adapters, "cpu") as (model, slots):
        together = model(**batch(4), adapter_names=[slots[name] for name in adapters]).logits
    for row, adapter in enumerate(adapters.values()):
        single = alone(base, adapter, lambda model: model(**batch(1)).logits)[0]
        torch.testing.assert_close(together[row], single, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_adapters_that_do_not_fit_at_once_are_loaded_after_each_other(
    tiny_base, tiny_prompts, tmp_path
):
    base, split = tiny_base("idefics3"), tiny_prompts("idefics3")
    adapters = {"base": None, **adapters_of(base, tmp_path, ["small", "large"])}
    rows = {"base": [7], "small": [2, 7], "large": [2]}
    batches: list[int] = []
    found = generate_many(
        base, adapters, split, rows, CONFIG, room=1, keep_going=lambda n: not batches.append(n)
    )
    assert batches == [0, 1, 3]  # one batch each, where all four answers would fit into one
    assert found == generate_many(base, adapters, split, rows, CONFIG)
    assert generate_many(base, adapters, split, rows, CONFIG, keep_going=lambda n: False) is None


def test_a_family_whose_rows_are_not_samples_is_answered_one_by_one(
    tiny_base, tiny_prompts, tmp_path
):
    base, split = tiny_base("mllama"), tiny_prompts("mllama")
    adapters = {"base": None, **adapters_of(base, tmp_path, ["small"])}
    rows = [3, 0]
    found = generate_many(base, adapters, split, dict.fromkeys(adapters, rows), CONFIG)
    assert set(found.one_by_one) == {"base", "small"}
    assert found.one_by_one["small"].startswith("PEFT: Length of `adapter_names`")
    for name, adapter in adapters.items():
        expected = alone(base, adapter, lambda model: generate(model, base, split, rows, CONFIG))
        assert found.by_name[name] == expected
