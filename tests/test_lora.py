"""Adapters on every family: rank and rate by scope, inits, scopes in full; saved and reloaded."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from made import experiment, held_scopes
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import CheckpointError, ModelError
from raytune_vlm.models.adapter_file import load_adapter, save_adapter
from raytune_vlm.models.loading import load_base
from raytune_vlm.models.lora import attach, detach, scope_of, target_modules, trainable_by_scope
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))


def families_and(name, first, *others):
    """The first value with every family, the others with one family only."""
    cases = [(family, first) for family in sorted(BUILDERS)]
    cases += [("idefics3", other) for other in others]
    return pytest.mark.parametrize(("model_type", name), cases)


STARTS = pytest.mark.parametrize("init", ["pissa", "olora"])


@contextmanager
def attached(base, config, seed=0):
    """An adapter on a base; checks that the base is bit-equal afterwards."""
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    model = attach(base.model, base.family, config, seed=seed)
    try:
        yield model
    finally:
        base.model = detach(model)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in base.model.parameters())


def inputs(base, split):
    batch = collate([split.encoded(0), split.encoded(1)], base.family, pad_token_id=0)
    del batch["labels"]
    return PixelTable(base.processor.image_processor, base.family)(batch)


@torch.no_grad()
def logits(model, batch):
    model.eval()
    return model(**batch).logits


def shake(model):
    """Random values for all that is trained, as if it had been."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def reloaded(base, folder, batch):
    """Logits of the adapter in a folder, loaded by PEFT alone."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, folder)
    try:
        return logits(model, batch)
    finally:
        base.model = detach(model)


MIXED = {"gemma4_unified", "nemotron_h_omni", "phi4_multimodal"}
"""Where a parameter of the vision tower or the projector lies beside modules of others."""


def linear_scopes(family, wanted=("text", "projector", "vision")):
    return [scope for scope in wanted if scope not in family.no_linear]


@families_and("alpha", {"alpha_ratio": 4.0}, {"alpha": 6.0})
def test_every_scope_has_its_rank_and_scale_also_when_reloaded(
    model_type, alpha, tiny_base, tiny_split, tmp_path
):
    base = tiny_base(model_type)
    ranks = {"text": 4, "projector": 3, "vision": 2}
    scopes = linear_scopes(base.family)
    config = LoraConfig(
        rank=5,
        scope="+".join(scopes),
        rank_by_scope={scope: ranks[scope] for scope in scopes},
        rslora=True,
        **alpha,
    )
    batch = inputs(base, tiny_split(model_type))
    with attached(base, config) as model:
        shake(model)
        expected = logits(model, batch)
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                rank = ranks[scope_of(name, base.family)]
                scale = alpha.get("alpha", 4.0 * rank) / math.sqrt(rank)
                assert module.lora_A["default"].weight.shape[0] == rank
                assert module.scaling["default"] == pytest.approx(scale)
        save_adapter(model, tmp_path)
    # To rounding: where a tensor lies in memory may change the order of a sum.
    assert torch.allclose(reloaded(base, tmp_path, batch), expected, atol=1e-5)


@families_and("init", "pissa", "olora")
def test_an_adapter_that_starts_from_the_weights_is_saved_for_the_unchanged_base(
    model_type, init, tiny_base, tiny_split, tmp_path
):
    if model_type == "gemma3n":
        pytest.skip("its smallest layers have rank 2 only")
    base = tiny_base(model_type)
    scopes = linear_scopes(base.family, ("text", "vision"))
    config = LoraConfig(
        rank=4,
        scope="+".join(scopes),
        rank_by_scope={"vision": 2} if "vision" in scopes else {},
        init=init,
        rslora=True,
    )
    batch = inputs(base, tiny_split(model_type))
    plain = logits(base.model, batch)
    with attached(base, config) as model:
        assert torch.allclose(logits(model, batch), plain, atol=2e-5)
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), plain)
        counts = trainable_by_scope(model, base.family)
        shake(model)
        expected = logits(model, batch)
        assert not torch.allclose(expected, plain, atol=1e-2)
        save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    assert torch.allclose(reloaded(base, tmp_path, batch), expected, atol=2e-5)
    with attached(base, config.model_copy(update={"init": "default"})) as model:
        assert trainable_by_scope(model, base.family) == counts
    with attached(base, config, seed=7) as model:
        load_adapter(tmp_path, model)
        assert torch.equal(logits(model, batch), expected)


@STARTS
def test_it_starts_with_the_largest_part_of_the_weights(init, tiny_base):
    base = tiny_base("idefics3")
    name = target_modules(base.model, base.family, ("text",))["text"][0]
    weight = base.model.get_submodule(name).weight
    with attached(base, LoraConfig(rank=8, init=init)) as model:
        layer = model.base_model.model.get_submodule(name)
        update = layer.get_delta_weight("default")
        assert torch.equal(update, -layer.get_delta_weight("start"))
    singular = torch.linalg.svdvals(weight)
    if init == "pissa":  # Eckart-Young: nothing of rank 8 is nearer to the weight
        assert (weight - update).norm() < 1.03 * singular[8:].norm()
    else:
        q, r = torch.linalg.qr(weight)
        assert torch.allclose(update, 2 * q[:, :8] @ r[:8], atol=1e-5)


def test_a_rank_that_the_weights_do_not_have_is_refused(tiny_base):
    base = tiny_base("idefics3")
    before = [name for name, _ in base.model.named_parameters()]
    with pytest.raises(ModelError, match=r"lora\.init=pissa: rank 33 is more than .* 32$"):
        attach(base.model, base.family, LoraConfig(rank=33, init="pissa"), seed=0)
    assert [name for name, _ in base.model.named_parameters()] == before


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_other_inits_begin_as_the_base_and_depend_on_the_seed(init, tiny_base, tiny_split):
    base = tiny_base("idefics3")
    batch = inputs(base, tiny_split("idefics3"))
    plain = logits(base.model, batch)
    drawn = []
    for seed in (1, 1, 2):
        with attached(base, LoraConfig(rank=4, init=init), seed=seed) as model:
            assert torch.allclose(logits(model, batch), plain, atol=1e-5)
            drawn.append(next(p.detach().clone() for p in model.parameters() if p.requires_grad))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@FAMILY
@pytest.mark.parametrize("full", ["projector+vision", "text"])
def test_a_scope_trained_in_full_is_saved_and_reloaded(
    model_type, full, tiny_base, tiny_split, tmp_path
):
    base = tiny_base(model_type)
    adapted = "text"
    if full == "text":
        adapted = linear_scopes(base.family, ("vision", "projector"))[0]
    full = held_scopes(base, full)
    config = LoraConfig(rank=2, scope=adapted, modules_to_save=full)
    if "vision" in full and model_type in MIXED:
        with pytest.raises(ModelError, match="lies in a module with parts of other scopes"):
            attach(base.model, base.family, config, seed=0)
        return
    batch = inputs(base, tiny_split(model_type))
    plain = logits(base.model, batch)
    sizes = dict.fromkeys(full.split("+"), 0)
    for name, parameter in base.model.named_parameters():
        if scope_of(name, base.family) in sizes:
            sizes[scope_of(name, base.family)] += parameter.numel()
    with attached(base, config) as model:
        assert torch.allclose(logits(model, batch), plain, atol=1e-5)
        assert sizes.items() <= trainable_by_scope(model, base.family).items()
        shake(model)
        expected = logits(model, batch)
        assert not torch.allclose(expected, plain, atol=1e-3)
        save_adapter(model, tmp_path)
    assert torch.allclose(reloaded(base, tmp_path, batch), expected, atol=1e-5)
    with attached(base, config, seed=5) as model:
        load_adapter(tmp_path, model)
        assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    with attached(base, LoraConfig(rank=2, scope=adapted)) as model, pytest.raises(CheckpointError):
        load_adapter(tmp_path, model)


def test_copies_of_a_half_precision_base_are_trained_in_float32(tiny_model, tiny_split, tmp_path):
    name = str(tiny_model("gemma3"))
    base = load_base(ModelConfig(name=name, dtype="bfloat16"))
    batch = inputs(base, tiny_split("gemma3"))
    with attached(base, LoraConfig(rank=2, modules_to_save="projector+vision")) as model:
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        out = model(**batch).logits
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        shake(model)
        expected = logits(model, batch)
        save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    difference = (reloaded(base, tmp_path, batch) - expected).float().norm()
    assert difference < 0.02 * expected.float().norm()  # PEFT rounds the copies to bfloat16


RECIPES = {
    "default": {},
    "pissa": {"init": "pissa", "scope": "text+vision", "rank_by_scope": {"vision": 2}},
    "olora": {"init": "olora"},
    "loraplus": {"loraplus_ratio": 8.0, "dora": True},
    "full": {"modules_to_save": "projector"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_is_bit_identical_with_every_recipe(recipe, tiny_base, tiny_split, tmp_path):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    lora = {"rank": 4, "dropout": 0.1, **RECIPES[recipe]}
    scope = "projector" if "modules_to_save" in lora else "text"
    train = {"max_steps": 8, "warmup_steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    rates = {"learning_rate_by_scope": {scope: 3e-3}}
    config = experiment(lora=lora, train={**train, **rates, "weight_decay": 0.01})

    def run(steps, start=None, save=None):
        made = Run(base, split, config, World(), TrainingData("d"))
        try:
            if start is not None:
                made.restore(start)
            losses = [made.step().loss for _ in range(steps)]
            assert made.auditor.checks.get("gradients", {"passed": True})["passed"]
            if save is not None:
                made.save(save)
            return losses
        finally:
            made.close()

    whole = run(6)
    first = run(3, save=tmp_path / "step_000003")
    assert first + run(3, start=tmp_path / "step_000003") == whole
    after = base.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_groups_follow_their_own_peaks_over_the_same_schedule(tiny_base, tiny_split):
    lora = {
        "rank": 2,
        "scope": "text+vision",
        "loraplus_ratio": 4.0,
        "modules_to_save": "projector",
    }
    train = {"learning_rate": 1e-3, "learning_rate_by_scope": {"vision": 5e-4}, "warmup_steps": 4}
    config = experiment(lora=lora, train={"max_steps": 8, "batch_size": 2, **train})
    base = tiny_base("idefics3")
    run = Run(base, tiny_split("idefics3"), config, World(), TrainingData("d"))
    try:
        seen = {}
        for expected in (0.25, 0.5):
            assert run.step().learning_rate == pytest.approx(1e-3 * expected)
            names = {parameter: name for name, parameter in run.model.named_parameters()}
            for group in run.optimizer.param_groups:
                assert group["lr"] == pytest.approx(group["peak"] * expected)
                for parameter in group["params"]:
                    name = names[parameter]
                    kind = (scope_of(name, base.family), ".lora_B." in name)
                    assert seen.setdefault(kind, group["peak"]) == group["peak"]
        assert seen == {
            ("text", False): 1e-3,
            ("text", True): 4e-3,
            ("vision", False): 5e-4,
            ("vision", True): 2e-3,
            ("projector", False): 1e-3,
        }
        trained = [p for p in run.model.parameters() if p.requires_grad]
        assert sum(len(g["params"]) for g in run.optimizer.param_groups) == len(trained)
    finally:
        run.close()


@FAMILY
def test_scopes_trained_in_full_pass_the_audit_and_learn(model_type, tiny_base, tiny_split):
    train = {"max_steps": 6, "warmup_steps": 1, "batch_size": 8, "learning_rate": 1e-2}
    if model_type in MIXED:
        pytest.skip("refused, as tested above")
    full = held_scopes(tiny_base(model_type), "projector+vision")
    config = experiment(lora={"rank": 2, "modules_to_save": full}, train=train)
    run = Run(tiny_base(model_type), tiny_split(model_type), config, World(), TrainingData("d"))
    try:
        losses = [run.step().loss for _ in range(6)]
        assert losses[-1] < losses[0]
        assert all(check["passed"] for check in run.auditor.checks.values())
        assert set(run.trainable) == {"text", *full.split("+")}
    finally:
        run.close()


def test_a_base_is_whole_after_memory_ran_out_half_way(tiny_base, monkeypatch):
    """Else every later trial of the executor would meet the leftovers."""
    base = tiny_base("idefics3")
    before = {name: id(module) for name, module in base.model.named_modules()}
    make, made = LoraLayer.update_layer, []

    def fail(layer, *args, **options):
        made.append(layer)
        if len(made) == 4:
            raise torch.OutOfMemoryError("for the fourth layer")
        return make(layer, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoraLayer, "update_layer", fail)
        with pytest.raises(torch.OutOfMemoryError, match="fourth"):
            attach(base.model, base.family, LoraConfig(rank=2), seed=0)
    assert {name: id(module) for name, module in base.model.named_modules()} == before
    adapted = attach(base.model, base.family, LoraConfig(rank=2), seed=0)
    base.model = detach(adapted)
    assert {name: id(module) for name, module in base.model.named_modules()} == before
