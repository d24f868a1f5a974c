"""The training step on real tiny models: normalisation, resume, checkpoints, divergence."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from made import experiment
from plain_loss import plain_loss
from safetensors.torch import load_file

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import CheckpointError, DataError, TrialDiverged
from raytune_vlm.models.lora import detach
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.prepare.feed import Collation, Part
from raytune_vlm.train import checkpoint
from raytune_vlm.train.retention import Retention
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.schedule import learning_rate
from raytune_vlm.train.world import World

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))


@pytest.fixture
def start(tiny_base, tiny_split):
    """Starts runs and takes their adapters off again at the end of the test."""
    opened = []

    def begin(model_type="idefics3", lora=None, **train):
        settings = {"max_steps": 12, "warmup_steps": 2, "batch_size": 8, "micro_batch_size": 8}
        config = experiment(lora={"rank": 4, **(lora or {})}, train={**settings, **train})
        run = Run(tiny_base(model_type), tiny_split(model_type), config, World(), TrainingData("d"))
        opened.append(run)
        return run

    def finish(run):
        opened.remove(run)
        run.close()

    begin.finish = finish
    yield begin
    for run in opened:
        run.close()


def losses(run, steps):
    return [run.step().loss for _ in range(steps)]


def adapter(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


@FAMILY
def test_the_loss_falls_and_the_audit_passes(model_type, start):
    run = start(model_type, learning_rate=1e-2)
    values = losses(run, 12)
    assert values[-1] < values[0] - 0.1
    assert {name: check["passed"] for name, check in run.auditor.checks.items()} == {
        "trainable": True,
        "gradients": True,
        "adapter_effect": True,
        "image_effect": True,
    }


@FAMILY
def test_the_loss_does_not_depend_on_the_micro_batch(model_type, start):
    curves = []
    for micro in (8, 3, 1):
        run = start(model_type, micro_batch_size=micro)
        curves.append(losses(run, 3))
        start.finish(run)
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


def test_a_resumed_run_is_bit_identical_with_dropout(start, tmp_path):
    whole = start(lora={"dropout": 0.2})
    expected = losses(whole, 10)
    weights = adapter(whole)
    start.finish(whole)
    first = start(lora={"dropout": 0.2})
    begun = losses(first, 4)
    first.save(tmp_path / "step_000004")
    start.finish(first)
    second = start(lora={"dropout": 0.2})
    second.restore(tmp_path / "step_000004")
    assert begun + losses(second, 6) == expected
    assert all(torch.equal(weights[name], value) for name, value in adapter(second).items())


def test_a_checkpoint_of_another_recipe_is_refused(start, tmp_path):
    run = start()
    run.step()
    run.save(tmp_path / "step_000001")
    start.finish(run)
    other = start(learning_rate=5e-3)
    with pytest.raises(CheckpointError, match="another recipe"):
        other.restore(tmp_path / "step_000001")
    start.finish(other)
    smaller = start(lora={"rank": 2})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        smaller.restore(tmp_path / "step_000001")


def test_a_run_goes_on_with_whatever_the_fingerprint_leaves_out(start, tmp_path):
    first = start()
    begun = losses(first, 2)
    first.save(tmp_path / "step_000002")
    expected = losses(first, 2)
    start.finish(first)
    second = start(
        cpus_per_worker=2, micro_batch_size=3, micro_batch_tokens=500, log_every=1, log_samples=True
    )
    assert second.experiment.fingerprint() == first.experiment.fingerprint()
    second.restore(tmp_path / "step_000002")
    assert second.steps_done == len(begun)
    assert losses(second, 2) == pytest.approx(expected, abs=1e-5)


def test_the_newest_whole_checkpoint_is_found_past_damaged_ones(start, tmp_path):
    run = start()
    for step in range(1, 5):
        run.step()
        run.save(tmp_path / f"step_{step:06d}")
    weights = tmp_path / "step_000004" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    state = tmp_path / "step_000003" / "state.json"
    flipped = bytearray(state.read_bytes())
    flipped[5] ^= 1
    state.write_bytes(bytes(flipped))
    (tmp_path / "step_000002" / "manifest.json").unlink()
    found, damaged = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step_000001"
    assert len(damaged) == 3
    assert "bytes instead of" in damaged[0] and "altered" in damaged[1]
    assert "never finished" in damaged[2]


def test_retention_keeps_the_newest_and_the_best(start, tmp_path):
    run = start()
    for step in range(1, 6):
        run.step()
        run.save(tmp_path / f"step_{step:06d}")
    Retention(newest=2, best=1, maximise=False).apply(tmp_path, {1: 0.1, 4: 0.3}, lambda step: True)
    assert sorted(checkpoint.steps(tmp_path)) == [1, 4, 5]


def test_the_checkpoint_is_peft_s_own_and_answers_the_same(start, tmp_path, tiny_base, tiny_split):
    from peft import PeftModel

    from raytune_vlm.collate.batch import PixelTable, collate

    run = start(learning_rate=1e-2)
    losses(run, 3)
    run.save(tmp_path / "step_000003")
    base = tiny_base("idefics3")
    batch = collate([tiny_split("idefics3").encoded(0)], base.family, pad_token_id=0)
    del batch["labels"]
    batch = PixelTable(base.processor.image_processor, base.family)(batch)
    run.model.eval()
    with torch.no_grad():
        expected = run.model(**batch).logits
    start.finish(run)
    loaded = PeftModel.from_pretrained(base.model, tmp_path / "step_000003")
    try:
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**batch).logits, expected)
    finally:
        base.model = detach(loaded)
    names = {path.name for path in (tmp_path / "step_000003").iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    state = json.loads((tmp_path / "step_000003" / "state.json").read_text())
    assert state["step"] == 3 and state["samples_seen"] == 24
    assert "rng/0/cpu" in load_file(tmp_path / "step_000003" / "optimizer.safetensors")


def test_steps_that_are_not_finite_are_skipped_then_the_trial_has_diverged(start):
    run = start()
    run.step()
    poisoned = next(p for p in run.model.parameters() if p.requires_grad)
    with torch.no_grad():
        poisoned.fill_(float("nan"))
    skipped = [run.step().skipped for _ in range(3)]
    assert skipped == [True, True, True]
    with pytest.raises(TrialDiverged, match="more than 3 steps were not finite") as raised:
        run.step()
    assert pickle.loads(pickle.dumps(raised.value)).message == raised.value.message


def test_a_run_that_cannot_begin_leaves_the_base_as_it_was(tiny_base, tiny_split):
    base = tiny_base("idefics3")
    before = [name for name, _ in base.model.named_parameters()]
    source = {"type": "messages", "path": "a.jsonl", "split": "train", "weight": 1}
    config = experiment(data={"sources": [source, {**source, "path": "b.jsonl"}]})
    with pytest.raises(DataError, match=r"sources\[1\] has a weight but no training samples"):
        Run(base, tiny_split("idefics3"), config, World(), TrainingData("d"))
    assert [name for name, _ in base.model.named_parameters()] == before


def test_wsd_stays_at_the_peak_until_its_decay():
    config = TrainConfig(
        max_steps=100, warmup_steps=10, learning_rate=0.5, schedule="wsd", decay_share=0.25
    )
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[10:76] == [0.5] * 66
    assert rates[76:] == pytest.approx([0.5 * (100 - step) / 25 for step in range(76, 100)])
    with pytest.raises(ValueError, match=r"decay_share=0\.5 has no effect: .*not wsd"):
        experiment(train={"decay_share": 0.5})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_rise_to_the_peak_and_end_where_they_should(schedule):
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=0.5, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == pytest.approx(0.5)
    assert rates[:10] == sorted(rates[:10])
    assert rates[-1] == pytest.approx(0.5 if schedule == "constant" else 0, abs=0.03)


@pytest.mark.parametrize("model_type", ["idefics3", "qwen2_5_vl", "gemma3"])
def test_a_step_of_packs_has_the_loss_of_its_samples(model_type, start, tiny_base, tiny_split):
    base, split = tiny_base(model_type), tiny_split(model_type)
    packs = {"pack_tokens": 2048, "batch_size": 2, "micro_batch_size": 1}
    run = start(model_type, **packs)
    rows = run.plan.rows(0)
    assert len(rows) > 2 * packs["batch_size"]
    collation = Collation(base.family.model_type, base.processor.tokenizer.pad_token_id, 1)
    total = 0.0
    with torch.no_grad():
        for row in rows.tolist():
            part = collation.collate(Part((row,), (0,)), [split.encoded(row)])
            batch, labels = run.batches.on_device(part.arrays, part.rows)
            total += float(plain_loss(run.model(**batch).logits, labels))
    step = run.step()
    assert step.loss == pytest.approx(total / split.num_labelled[rows].sum(), rel=1e-5)
    assert step.tokens == split.lengths[rows].sum()


def test_packs_and_padding_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"pack_tokens=64 must be at least data.max_length=2048"):
        experiment(train={"pack_tokens": 64})
    with pytest.raises(ValueError, match="exclude each other"):
        experiment(train={"pack_tokens": 4096, "group_by_length": True})
