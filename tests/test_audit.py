"""The audit: what it finds in good runs, what it names in broken ones, that it leaves no trace."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from made import experiment, picture, turn
from safetensors.torch import load_file, save_file

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.features import Features
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.errors import AuditFailed
from raytune_vlm.models import audit
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))


@pytest.fixture
def trained(tiny_base, tiny_split, tmp_path):
    """A run of three steps with its checkpoint, closed at the end of the test."""
    opened = []

    def begin(model_type="idefics3", **lora):
        train = {"max_steps": 3, "warmup_steps": 0, "batch_size": 4, "learning_rate": 1e-2}
        train["micro_batch_size"] = 4
        config = experiment(lora={"rank": 4, **lora}, train=train)
        run = Run(tiny_base(model_type), tiny_split(model_type), config, World(), TrainingData("d"))
        opened.append(run)
        for _ in range(3):
            run.step()
        run.save(tmp_path / "step_000003")
        return run, tmp_path / "step_000003"

    yield begin
    for run in opened:
        run.close()


def batch_of(base, split):
    batch = collate([split.encoded(0)], base.family, pad_token_id=0)
    del batch["labels"]
    return PixelTable(base.processor.image_processor, base.family)(batch)


def state_of(base):
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


@FAMILY
@pytest.mark.parametrize("dora", [False, True])
def test_the_end_of_a_run_is_audited_and_leaves_the_base_bit_equal(
    model_type, dora, trained, tiny_base
):
    base = tiny_base(model_type)
    before = state_of(base)
    run, folder = trained(model_type, dora=dora)
    run.audit_end(folder)
    checks = run.auditor.checks
    assert {name: check["passed"] for name, check in checks.items()} == dict.fromkeys(
        ("trainable", "gradients", "adapter_effect", "image_effect", "merge", "reload"), True
    )
    assert 0 <= checks["reload"]["value"] <= checks["reload"]["tolerance"] < 1e-3
    assert 0 <= checks["merge"]["value"] <= checks["merge"]["tolerance"] < 1e-3
    assert checks["merge"]["value"] < checks["adapter_effect"]["value"] / 100
    assert checks["trainable"]["by_scope"] == run.trainable
    json.dumps(checks)
    run.close()
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_merging_writes_nothing_to_the_resident_weights(tiny_base, tiny_split, trained):
    run, _ = trained()
    model = tiny_base("idefics3").model
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    audit.check_merge(run.model, batch_of(tiny_base("idefics3"), tiny_split("idefics3")))
    after = model.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_that_answers_differently_fails_by_name(trained, tmp_path):
    run, folder = trained()
    altered = tmp_path / "altered"
    shutil.copytree(folder, altered)
    weights = load_file(altered / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * 1.01}, altered / "adapter_model.safetensors")
    with pytest.raises(AuditFailed, match=r"audit: reload: .*\(value .*, tolerance "):
        run.audit_end(altered)
    assert run.auditor.checks["reload"]["passed"] is False
    assert run.auditor.checks["merge"]["passed"] is True


def test_a_merge_that_differs_fails_by_name_value_and_tolerance(trained, monkeypatch):
    monkeypatch.setitem(audit.MERGE_ROUNDINGS, "float32", -1)
    run, folder = trained()
    with pytest.raises(AuditFailed, match=r"audit: merge: .*\(value .*, tolerance -"):
        run.audit_end(folder)


def test_a_gradient_that_is_missing_or_not_finite_is_named(trained):
    run, _ = trained()
    parameters = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    assert audit.check_gradients(run.model)["passed"]
    name, first = next(iter(parameters.items()))
    first.grad = torch.full_like(first, float("inf"))
    assert audit.check_gradients(run.model)["message"] == f"the gradient of {name} is not finite"
    first.grad = None
    with pytest.raises(AuditFailed, match=f"gradients: {name} is trainable but received no"):
        audit.raise_failed({"gradients": audit.check_gradients(run.model)})


def test_parameters_of_another_scope_than_asked_are_told():
    check = audit.check_trainable({"text": 10, "vision": 4}, ("text",))
    assert not check["passed"] and "text+vision" in check["message"]
    assert not audit.check_trainable({}, ("text",))["passed"]


def test_an_adapter_without_effect_fails_and_a_blind_model_is_a_note(tiny_base, tiny_split):
    base = tiny_base("gemma3")
    batch = batch_of(base, tiny_split("gemma3"))
    projection = base.model.model.multi_modal_projector.mm_input_projection_weight
    kept = projection.detach().clone()
    adapted = attach(base.model, base.family, LoraConfig(rank=2), seed=0)
    try:
        with torch.no_grad():
            projection.zero_()
        checks = audit.check_effects(adapted, batch)
    finally:
        with torch.no_grad():
            projection.copy_(kept)
        base.model = detach(adapted)
    assert not checks["image_effect"]["passed"] and checks["image_effect"]["value"] == 0
    (note,) = audit.failure_notes(checks)
    assert "image_effect not passed: a blank image" in note
    with pytest.raises(AuditFailed, match="adapter_effect: switching the adapter off"):
        audit.raise_failed(checks)
    audit.raise_failed({"image_effect": checks["image_effect"]})


def test_samples_with_unlike_numbers_of_images_are_audited_together(tiny_base):
    """Idefics3 takes tiles of zeros for padding: they stay so where images are made blank."""
    base = tiny_base("idefics3")
    encoder = Encoder(base.processor, base.family)
    samples = []
    for count in (2, 1):
        messages = [turn("user", "read", images=count), turn("assistant", "tea")]
        samples.append(encoder.training(messages, [picture(n) for n in range(count)]))
    batch = collate(samples, base.family, pad_token_id=0)
    del batch["labels"]
    table = PixelTable(base.processor.image_processor, base.family)
    adapted = attach(base.model, base.family, LoraConfig(rank=2), seed=0)
    try:
        checks = audit.check_effects(adapted, table(batch))
    finally:
        base.model = detach(adapted)
    assert checks["image_effect"]["passed"]


def test_a_run_with_features_is_asked_whether_it_looks_at_images(tiny_base, tiny_split):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    features = Features(base, "cpu", 1 << 30)
    config = experiment(train={"max_steps": 2, "warmup_steps": 0, "batch_size": 4})
    run = Run(base, split, config, World(), TrainingData("d"), features=features)
    run.step()
    checks = run.auditor.checks
    run.close()
    assert checks["image_effect"]["passed"] and features.computed
