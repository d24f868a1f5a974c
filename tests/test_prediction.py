"""What is predicted before a launch against what an attached model has and a real step takes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from made import experiment, held_scopes

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import load_base, meta_model
from raytune_vlm.models.lora import attach, detach, trainable_by_scope
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.train.prediction import Prediction, describe, predict
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

UNSPLIT = {"gemma4_unified", "nemotron_h_omni", "phi4_multimodal"}
"""Where the projector cannot be trained in full (tests/test_lora.py)."""
MIXED = {"scope": "text+vision", "rank_by_scope": {"vision": 2}, "modules_to_save": "projector"}
OTHERS = [
    {"scope": "text", "init": "pissa"},
    {"scope": "text+projector+vision", "dora": True},
]
CASES = [(model_type, MIXED) for model_type in sorted(BUILDERS)]
CASES += [(model_type, {"scope": "projector+vision"}) for model_type in sorted(BUILDERS)]
CASES += [("idefics3", lora) for lora in OTHERS]


@pytest.mark.parametrize(("model_type", "lora"), CASES)
def test_the_predicted_count_is_that_of_the_attached_model(model_type, lora, tiny_base, tiny_model):
    base = tiny_base(model_type)
    scopes = [s for s in lora["scope"].split("+") if s not in base.family.no_linear]
    if "vision" not in scopes:
        lora = {name: value for name, value in lora.items() if name != "rank_by_scope"}
    if model_type in UNSPLIT:
        lora = {name: value for name, value in lora.items() if name != "modules_to_save"}
    if "modules_to_save" in lora:
        lora = {**lora, "modules_to_save": held_scopes(base, lora["modules_to_save"]) or None}
    config = experiment(
        tiny_model(model_type),
        lora={"rank": 4, **lora, "scope": "+".join(scopes)},
        train={"batch_size": 2},
        data={"max_length": 64, "sources": [{"type": "messages", "path": "a.jsonl"}]},
    )
    model = attach(base.model, base.family, config.lora, seed=0)
    counts = trainable_by_scope(model, base.family)
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    base.model = detach(model)
    predicted = predict(config)
    assert predicted.trainable == counts
    assert predicted.weights + predicted.adapter == sum(held.values())


def test_memory_that_cannot_be_predicted_is_told_with_the_reason():
    found = Prediction({"text": 8}, 10, 32, 32, 64, None, 2, 64, obstacle="shapes hang on weights")
    assert found.total is None
    line = describe(found, experiment(lora={"rank": 4}).lora)
    assert line == (
        "8 trained parameters (text 8 at rank 4); "
        "memory cannot be predicted: shapes hang on weights"
    )


WIDER = {
    "idefics3": {
        "text_config": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 5},
        "vision_config": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    },
    "qwen2_5_vl": {
        "text_config": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
        "vision_config": {"hidden_size": 96, "intermediate_size": 256, "out_hidden_size": 256},
    },
}


@pytest.fixture
def wider(tiny_model, tmp_path):
    """A wider and deeper model of a family, with the tiny one's processor."""

    def make(model_type, **settings):
        folder = tmp_path / model_type
        shutil.copytree(tiny_model(model_type), folder)
        config = json.loads((folder / "config.json").read_text())
        for part, changes in WIDER[model_type].items():
            config[part].update(changes)
            config[part].pop("head_dim", None)
            config[part].pop("layer_types", None)
        if "rope_parameters" in config["text_config"]:
            rope = config["text_config"]["rope_parameters"]
            if "mrope_section" in rope:
                rope["mrope_section"] = [8, 12, 12]
        (folder / "config.json").write_text(json.dumps(config))
        model = meta_model(ModelConfig(name=str(folder))).to_empty(device="cpu")
        torch.manual_seed(0)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder)
        return load_base(ModelConfig(name=str(folder), **settings))

    return make


def measured_peak(run):
    """Bytes of the allocator at the peak of a step, over what was there before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run.step()
    events = profile.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("model_type", "lora", "model", "train"),
    [
        ("idefics3", {"rank": 16, "scope": "text+vision"}, {}, {}),
        ("idefics3", {"rank": 8, "modules_to_save": "projector"}, {}, {"micro_batch_size": 4}),
        ("idefics3", {"rank": 8}, {}, {"activation_checkpointing": {"text": True}}),
        ("qwen2_5_vl", {"rank": 8, "scope": "text+projector+vision"}, {"dtype": "bfloat16"}, {}),
        ("qwen2_5_vl", {"rank": 8, "init": "pissa"}, {}, {}),
    ],
)
def test_the_predicted_memory_is_within_a_tenth_of_the_measured(
    model_type, lora, model, train, wider, tiny_split
):
    base, split = wider(model_type, **model), tiny_split(model_type)
    config = experiment(
        lora=lora,
        train={"max_steps": 6, "warmup_steps": 1, "batch_size": 8, **train},
    )
    settings = ModelConfig(name=base.model.name_or_path, **model)
    config = config.model_copy(update={"model": settings})
    run = Run(base, split, config, World(), TrainingData("d"))
    try:
        run.step()  # the audit, and the optimizer's moments
        part = max(
            run.batches.collation.parts(run.plan, split.lengths, 1), key=lambda p: len(p.rows)
        )
        predicted = predict(config, [split.encoded(row) for row in part.rows])
        held = [*run.model.parameters(), *run.model.buffers()]
        held += [t for state in run.optimizer.state.values() for t in state.values()]
        static = sum({id(t): t.nbytes for t in held}.values())
        peak = measured_peak(run)
    finally:
        run.close()
    assert predicted.total == pytest.approx(static + peak, rel=0.1)
    assert predicted.total - static == pytest.approx(peak, rel=0.1)
