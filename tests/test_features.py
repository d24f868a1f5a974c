"""Features of a frozen tower stand in for pixels: the same answers, computed once an image."""

from __future__ import annotations

import functools

import pytest
import torch
from made import experiment
from transformers.models.donut.modeling_donut_swin import DonutDropPath

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.features import Features, drops
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.train.batches import TrainingData
from raytune_vlm.train.run import Run
from raytune_vlm.train.world import World

TAKEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "smolvlm", "internvl", "llava",
         "llava_next", "llava_onevision", "paligemma", "pixtral", "mistral3", "gemma3n",
         "gemma4"]  # fmt: skip
"""Families that take features in the place of pixels."""
MUCH = 1 << 30


def logits(base, samples, rows, features=None):
    pad = base.processor.tokenizer.pad_token_id
    batch = collate([samples.encoded(row) for row in rows], base.family, pad_token_id=pad)
    del batch["labels"]
    if features is not None:
        batch = features.replace(batch, samples, rows)
    table = PixelTable(base.processor.image_processor, base.family, backend=base.image_backend)
    with torch.no_grad():
        return base.model(**table(batch), use_cache=False).logits


@pytest.mark.parametrize("model_type", TAKEN)
def test_a_batch_with_features_is_answered_as_with_pixels(model_type, tiny_base, tiny_split):
    base, split = tiny_base(model_type), tiny_split(model_type)
    features = Features(base, "cpu", MUCH)
    by_images = sorted(range(40), key=lambda row: int(split.num_images[row]))
    rows = [by_images[place] for place in (0, 13, 20, 26, 30, 39)]
    assert len({split.lengths[row] for row in rows}) > 1, "rows are too much alike"
    expected = logits(base, split, rows)
    found = logits(base, split, rows, features)
    assert features.obstacle is None
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert torch.equal(logits(base, split, rows, features), found)
    assert features.computed <= features.found + len(rows)


def test_the_least_recently_used_are_dropped(tiny_base, tiny_split):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    rows = [row for row in range(40) if split.num_images[row]][:3]
    features = Features(base, "cpu", 1)
    for row in (rows[0], rows[0], rows[1], rows[0]):
        logits(base, split, [row], features)
    assert (features.computed, features.found) == (3, 1)


def test_a_run_with_features_goes_where_one_with_pixels_goes(tiny_base, tiny_split):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    features = Features(base, "cpu", MUCH)
    losses = []
    for given in (None, features, features):
        run = Run(base, split, experiment(), World(), TrainingData("d"), features=given)
        losses.append([run.step().loss for _ in range(4)])
        run.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == losses[1]


def test_a_run_that_trains_the_projector_never_uses_them(tiny_base, tiny_split):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    features = Features(base, "cpu", MUCH)
    config = experiment(lora={"scope": "text+projector"})
    run = Run(base, split, config, World(), TrainingData("d"), features=features)
    run.step()
    run.close()
    assert features.computed == 0


def test_answers_with_features_are_those_with_pixels(tiny_base, tiny_prompts):
    base, prompts = tiny_base("qwen2_5_vl"), tiny_prompts("qwen2_5_vl")
    features = Features(base, "cpu", MUCH)
    config = EvaluationConfig(metrics=("exact_match@strip",), max_new_tokens=5, batch_size=4)
    texts = [
        [entry.text for entry in generate(base.model, base, prompts, range(12), config, **given)]
        for given in ({}, {"features": features}, {"features": features})
    ]
    assert texts[0] == texts[1] == texts[2]
    assert features.computed > 0 and features.found >= features.computed


def test_a_model_that_takes_no_features_says_so(tiny_base):
    assert "takes no features" in (
        Features(tiny_base("vision-encoder-decoder"), "cpu", MUCH).obstacle or ""
    )


def test_stochastic_depth_is_dropout():
    assert drops(DonutDropPath(0.1)) and not drops(DonutDropPath(0.0))


def test_what_a_model_answers_otherwise_with_is_left_and_said(tiny_base, tiny_split, monkeypatch):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    owner, said = base.model.base_model, []
    encode = owner.get_image_features

    @functools.wraps(encode)
    def other(*args, **options):
        found = encode(*args, **options)
        found.pooler_output = [
            image * 2 for image in found.pooler_output
        ]  # not what its forward makes of pixels
        return found

    row = next(row for row in range(40) if split.num_images[row])
    features = Features(base, "cpu", MUCH, said.append)
    expected = logits(base, split, [row])
    monkeypatch.setattr(features, "_encode", other)
    assert torch.equal(logits(base, split, [row], features), expected)
    assert len(said) == 1 and "answers otherwise with features than with pixels" in said[0]
