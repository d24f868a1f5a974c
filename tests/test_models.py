"""Families, LoRA scopes, loading errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from made import experiment, picture, turn
from safetensors.torch import load_file, save_file

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.image_backends import image_backend
from raytune_vlm.models.loading import load_base, load_processor
from raytune_vlm.models.location import check_model, model_fingerprint
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
        if scope_of(name, base.family) is None
        and "lm_head" not in name
        and not name.startswith(base.family.outside)
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


def test_a_backend_that_cannot_resize_as_the_processor_does_is_refused(tiny_base):
    lanczos = tiny_base("idefics3").processor.image_processor
    wanted = ModelConfig(image_backend="torchvision")
    with pytest.raises(ModelError, match=r"resizes with LANCZOS.*image_backend: pil"):
        image_backend(wanted, lanczos)
    assert image_backend(ModelConfig(image_backend="auto"), lanczos) == "pil"
    bicubic = tiny_base("qwen2_5_vl").processor.image_processor
    assert image_backend(wanted, bicubic) == "torchvision"


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    """In a hub cache as a download leaves it, `main` moves on to another commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached, (old, new) = tmp_path / "models--a--b", ("0" * 40, "1" * 40)
    for commit in (old, new):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()

    def revision(**settings):
        return model_fingerprint(ModelConfig(name="a/b", **settings))["revision"]

    for commit in (old, new):
        (cached / "refs" / "main").write_text(commit)
        assert revision() == revision(revision="main") == commit
    assert revision(revision=old) == old
    with pytest.raises(ModelError, match="not to be had from the hub"):
        revision(revision="v9")


def test_a_tiny_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KeyError, match="did you mean 'idefics3'"):
        write_tiny_model("idefics", tmp_path)


def test_the_scope_is_written_in_one_order():
    assert LoraConfig(scope="vision+text").scope == "text+vision"


VIDEO_PROCESSORS = {
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen2_5_omni_thinker": "Qwen2VLVideoProcessor",
    "gemma4": "Gemma4VideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
}
"""What the hub's checkpoints name, and torchvision alone provides."""


@pytest.mark.parametrize("layout", ["one file", "a file for each"])
@pytest.mark.parametrize("model_type", sorted(VIDEO_PROCESSORS))
def test_a_hub_checkpoint_s_processor_loads_without_its_video_part(
    model_type, layout, tiny_model, tmp_path
):
    folder = tmp_path / model_type
    shutil.copytree(tiny_model(model_type), folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["video_processor"]["video_processor_type"] = VIDEO_PROCESSORS[model_type]
    if layout == "a file for each":
        video = settings.pop("video_processor")
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
        images = settings.pop("image_processor") | {"processor_class": settings["processor_class"]}
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    file.write_text(json.dumps(settings))
    encoded = []
    for name in (folder, tiny_model(model_type)):
        processor = load_processor(ModelConfig(name=str(name)))
        encoder = Encoder(processor, FAMILIES[model_type])
        encoded.append(
            encoder.training([turn("user", "q", 1), turn("assistant", "a")], [picture(1)])
        )
    ours, expected = encoded
    assert ours.input_ids.tolist() == expected.input_ids.tolist()
    assert np.array_equal(ours.tensors["pixel_values"], expected.tensors["pixel_values"])


@pytest.mark.parametrize("kind", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_of_a_whole_omni_checkpoint_is_what_is_loaded(kind, tiny_model, tmp_path):
    thinker = tiny_model(f"{kind}_thinker")
    folder = tmp_path / kind
    shutil.copytree(thinker, folder)
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": kind, "thinker_config": config, "architectures": ["Whole"]}
    (folder / "config.json").write_text(json.dumps(whole))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"thinker.{name}": tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = load_base(ModelConfig(name=str(folder)))
    expected = load_base(ModelConfig(name=str(thinker))).model.state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tiny_model_of_any_family_is_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert check_model(ModelConfig(name="tiny:llava")) is FAMILIES["llava"]
    with pytest.raises(ModelError, match=r"'tiny:llama': no such family \(did you mean 'mllama'"):
        check_model(ModelConfig(name="tiny:llama"))
    assert [path.name for path in tmp_path.glob("raytune_vlm/*/*")] == ["llava"]
