"""Models that bring code: nothing of it runs unasked, and with the option they are as others."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from made import cli_environment, experiment, picture, run_cli, turn, write_data
from remote_code import CLASSES

from raytune_vlm.collate.batch import PixelTable
from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.errors import ConfigError, ModelError
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.loading import load_base, load_processor
from raytune_vlm.models.location import check_model
from raytune_vlm.models.lora import scope_of
from raytune_vlm.models.processors.kimi_vl import scaled_size
from raytune_vlm.models.processors.nemotron_parse import NemotronParseImages, fitting_size
from raytune_vlm.models.processors.nvlm_d import build as build_nvlm
from raytune_vlm.models.processors.nvlm_d import tagged_tiles
from raytune_vlm.models.trust import OPTION, code_digest, with_trust
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

FAMILY = pytest.mark.parametrize("model_type", sorted(CLASSES))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the folder with code in configuration, model and tokenizer."""
    return shutil.copytree(tiny_model("kimi_vl"), tmp_path / "model")


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that exists once code of the model folder has run."""
    monkeypatch.setenv("MARK_CODE_THAT_RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


def test_every_remote_family_has_a_stand_in_and_is_unknown_to_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    remote = {name for name, family in FAMILIES.items() if family.remote_code}
    assert remote == set(CLASSES)
    assert not remote & set(CONFIG_MAPPING)


def test_without_the_option_no_code_runs_and_the_refusal_names_it(folder, tmp_path, mark):
    write_data(tmp_path / "data", num_train=2, num_other=1)
    target = tmp_path / "data" / "train.jsonl"
    refused = run_cli("data", "inspect", "--model", folder, target, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    message = refused.stderr.strip()
    assert message.count("\n") == 0 and "does not run unasked" in message
    assert message.endswith(f"{OPTION} {folder}@{code_digest(folder)}")
    assert not mark.exists()


def test_a_commit_of_the_hub_is_trusted_and_is_what_is_loaded(folder, tmp_path, mark, monkeypatch):
    cache = tmp_path / "hub" / "models--owner--small"
    shutil.copytree(folder, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_data(tmp_path / "data", num_train=2, num_other=1)
    command = ("data", "inspect", "--model", "owner/small", tmp_path / "data" / "train.jsonl")
    refused = run_cli(*command, check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith(f"{OPTION} owner/small@{COMMIT}")
    other = run_cli(*command, OPTION, f"owner/small@{COMMIT[::-1]}", check=False)
    assert other.returncode == 2 and not mark.exists()
    done = run_cli(*command, OPTION, f"owner/small@{COMMIT}")
    assert "tea" in done.stdout and mark.exists()


@pytest.mark.parametrize("load", [check_model, load_processor, load_base])
def test_nothing_that_loads_runs_code_unasked(load, folder, mark):
    with pytest.raises(ModelError, match="does not run unasked"):
        load(experiment(folder).model)
    assert not mark.exists()


def test_changed_code_asks_again(folder, mark):
    before = code_digest(folder)
    trusted = with_trust(experiment(folder), f"{folder}@{before}")
    with (folder / "modeling_small.py").open("a") as stream:
        stream.write("# one more line\n")
    after = code_digest(folder)
    assert after != before
    with pytest.raises(ModelError, match=f"@{after}"):
        load_base(trusted.model)
    with pytest.raises(ConfigError, match=f"is another one, {after}"):
        with_trust(experiment(folder), f"{folder}@{before}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "modeling_small.Tower"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert code_digest(folder) not in (before, after)
    assert not mark.exists()


def test_neither_yaml_nor_an_override_nor_a_search_space_turns_it_on(tmp_path):
    plain = "name: x\ndata: {sources: [{type: messages, path: train.jsonl}]}\n"
    file = tmp_path / "x.yaml"
    file.write_text(plain)
    for key in ("model.trust_remote_code", "model.trusted_revision", "trust_remote_code"):
        with pytest.raises(ConfigError, match=f"{OPTION} MODEL@REVISION on the command line"):
            load_experiment(file, [f"{key}=true"])
    file.write_text(plain + "model: {name: demo, trust_remote_code: true}\n")
    with pytest.raises(ConfigError, match=r"x\.yaml:3: model\.trust_remote_code: .*command line"):
        load_experiment(file)
    space = "sweep: {search_space: {model.trusted_revision: {type: choice, values: [a, b]}}}\n"
    file.write_text(plain + space)
    with pytest.raises(ConfigError, match=r"model\.trusted_revision"):
        load_experiment(file)
    file.write_text(plain + "model: {_trusted_revision: a}\n")
    with pytest.raises(ConfigError, match="_trusted_revision"):
        load_experiment(file)


def test_trust_travels_between_processes_and_is_lost_on_the_way_through_data(folder):
    plain = experiment(folder)
    trusted = with_trust(plain, f"{folder}@{code_digest(folder)}")
    assert pickle.loads(pickle.dumps(trusted)).model.trusted_revision == code_digest(folder)
    assert trusted.with_recipe({"lora.rank": 2}).model.trusted_revision == code_digest(folder)
    assert trusted.with_recipe({"model.name": "demo"}).model.trusted_revision is None
    dumped = trusted.model_dump(mode="json")
    assert dumped == plain.model_dump(mode="json")
    assert ExperimentConfig.model_validate(dumped).model.trusted_revision is None
    dumped["model"]["_trusted_revision"] = code_digest(folder)
    with pytest.raises(ValueError, match="_trusted_revision"):
        ExperimentConfig.model_validate(dumped)
    assert trusted.fingerprint() != plain.fingerprint()
    assert plain.model.trusted_revision is None


def test_the_option_names_the_model_and_a_whole_revision(folder):
    hub = experiment("owner/model")
    for given, message in (
        ("owner/model", "must be MODEL@REVISION"),
        (f"other/model@{COMMIT}", "the model is model.name='owner/model'"),
        ("owner/model@main", "40 hexadecimal digits"),
        (f"owner/model@{COMMIT[:12]}", "40 hexadecimal digits"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_trust(hub, given)
    pinned = hub.with_recipe({"model.revision": "v1"})
    with pytest.raises(ConfigError, match=r"model\.revision='v1'"):
        with_trust(pinned, f"owner/model@{COMMIT}")
    model = with_trust(hub, f"owner/model@{COMMIT}").model
    assert (model.revision, model.trusted_revision) == (COMMIT, COMMIT)
    assert with_trust(hub, None) is hub


def test_a_family_of_transformers_is_loaded_natively_whatever_its_auto_map_says(
    tiny_model, tmp_path, mark
):
    folder = shutil.copytree(tiny_model("idefics3"), tmp_path / "native")
    shutil.copy(tiny_model("kimi_vl") / "configuration_small.py", folder)
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        plain = json.loads((folder / name).read_text())
        own = "configuration_small.SmallConfig"
        plain["auto_map"] = {"AutoConfig": own, "AutoModelForImageTextToText": own}
        (folder / name).write_text(json.dumps(plain))
    base = load_base(experiment(folder).model)
    assert type(base.model).__module__.startswith("transformers.models.idefics3")
    assert not mark.exists()
    needless = with_trust(experiment(folder), f"{folder}@{code_digest(folder)}")
    with pytest.raises(ModelError, match=f"leave {OPTION} out"):
        check_model(needless.model)


def test_code_of_another_repository_is_never_taken(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "other/repository--modeling.Model"
    (folder / "config.json").write_text(json.dumps(config))
    trusted = with_trust(experiment(folder), f"{folder}@{code_digest(folder)}")
    with pytest.raises(ModelError, match="from another repository"):
        check_model(trusted.model)
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no code of its own"):
        check_model(experiment(folder).model)


def test_a_link_to_a_folder_hides_no_code(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="is a link to a folder"):
        code_digest(folder)


def test_validate_says_so_without_loading_anything_heavy(folder, write_experiment, mark):
    file, _ = write_experiment(model={"name": str(folder)})
    option = f"{folder}@{code_digest(folder)}"
    code = (
        "import sys; from raytune_vlm.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "validate", "--quick", str(file), OPTION, option],
        capture_output=True, text=True, check=True, env=cli_environment(),
    )  # fmt: skip
    assert "(kimi_vl)" in done.stdout and done.stdout.endswith("[]\n")
    assert not mark.exists()


@FAMILY
def test_every_parameter_but_the_head_lies_in_a_scope(model_type, tiny_base):
    base = tiny_base(model_type)
    outside = [
        name
        for name, _ in base.model.named_parameters()
        if scope_of(name, base.family) is None and "lm_head" not in name
    ]
    assert outside == []


@FAMILY
def test_a_run_trains_all_scopes_and_the_model_answers(model_type, tiny_base, tiny_split):
    base, split = tiny_base(model_type), tiny_split(model_type)
    train = {"max_steps": 6, "warmup_steps": 1, "batch_size": 8, "learning_rate": 1e-2}
    lora = {"rank": 2, "scope": "text+projector+vision"}
    run = Run(base, split, experiment(lora=lora, train=train), World(), TrainingData("d"))
    try:
        losses = [run.step().loss for _ in range(6)]
        assert losses[-1] < losses[0] - 0.05
        assert all(check["passed"] for check in run.auditor.checks.values()), run.auditor.checks
        config = EvaluationConfig(max_new_tokens=3, batch_size=2)
        found = generate(run.model, base, split, [0, 1, 2], config)
        assert [entry.sample_id for entry in found] == ["s0", "s1", "s2"]
    finally:
        run.close()


@FAMILY
def test_pixels_equal_those_of_the_processor(model_type, tiny_base):
    base = tiny_base(model_type)
    images = base.processor.image_processor
    maker = PixelMaker(images, base.family, "pil", ImageLimits())
    for number, size in enumerate([(64, 48), (31, 90), (300, 220)]):
        buffer = io.BytesIO()
        picture(number, *size).save(buffer, format="PNG")
        made = {name: torch.from_numpy(v) for name, v in maker.decode([buffer.getvalue()]).items()}
        given = images([picture(number, *size)], return_tensors="np")
        if "image_grid_thw" in given:
            made["image_grid_thw"] = torch.from_numpy(given["image_grid_thw"])
        assert made["pixel_values"].dtype == torch.uint8
        ours = PixelTable(images, base.family)(made)["pixel_values"].numpy()
        assert np.array_equal(ours, np.asarray(given["pixel_values"])), size


def test_kimi_s_images_become_a_token_for_four_patches(tiny_base):
    # Grids by hand, with 16 patches of 14 pixels at most and padding to 28.
    images = tiny_base("kimi_vl").processor.image_processor
    for (width, height), grid in {
        (28, 28): [2, 2],
        (29, 28): [2, 4],
        (56, 56): [4, 4],
        (112, 112): [4, 4],
        (224, 56): [2, 8],
    }.items():
        made = images([picture(0, width, height)], return_tensors="np")
        assert made["image_grid_hws"].tolist() == [grid], (width, height)
        assert made["pixel_values"].shape == (grid[0] * grid[1], 3, 14, 14)
    assert scaled_size(896, 896, 14, 4096) == (896, 896)
    assert scaled_size(1792, 1792, 14, 4096) == (896, 896)
    cut = type(images)(pad_input=False, in_token_limit=16)([picture(0, 59, 30)])
    assert cut["image_grid_hws"].tolist() == [[2, 4]]
    with pytest.raises(ValueError, match="0 x 2 patches"):
        type(images)(pad_input=False)([picture(0, 40, 20)])


def test_nvlm_s_tiles_are_internvl_s_and_each_has_its_tag(tiny_base):
    # Grids by the published rule: the nearest aspect ratio of at most six tiles; of two alike the
    # larger, if the image has more than half its area; one thumbnail more where there are several.
    tokenizer = tiny_base("NVLM_D").processor.tokenizer
    config = {"vision_config": {"image_size": 448, "patch_size": 14}}
    processor = build_nvlm(tokenizer, config, {})
    assert processor.image_seq_length == 256
    for (width, height), tiles in {
        (448, 448): 1,
        (1000, 1000): 5,
        (800, 600): 7,
        (1344, 448): 4,
        (300, 1200): 5,
        (5000, 500): 7,
    }.items():
        made = processor.image_processor([picture(0, width, height)], return_tensors="np")
        assert made["num_patches"].tolist() == [tiles], (width, height)
        assert made["pixel_values"].shape == (tiles, 3, 448, 448)
    pad = "<|vision_pad|>"
    assert tagged_tiles(1, 2) == f"<Image><tile_global_thumbnail>{pad}{pad}</Image>"
    assert tagged_tiles(3, 1) == (
        f"<Image><tile_1>{pad}<tile_2>{pad}<tile_global_thumbnail>{pad}</Image>"
    )
    with pytest.raises(ModelError, match="use_thumbnail"):
        build_nvlm(tokenizer, {**config, "use_thumbnail": False}, {})


def test_nvlm_s_prompt_is_the_tokenizer_s_chat_template_with_the_image_ahead(tiny_base):
    base = tiny_base("NVLM_D")
    encoder = Encoder(base.processor, base.family)
    chat = [turn("system", "be brief"), turn("user", "what?", 1), turn("assistant", "tea")]
    encoded = encoder.training(chat, [picture(0, 56, 56)])
    text = base.processor.tokenizer.decode(encoded.input_ids)
    image = tagged_tiles(1, 4)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        f"<|im_start|>user\n{image}\nwhat?<|im_end|>\n<|im_start|>assistant\ntea<|im_end|>\n"
    )
    assert encoder.num_media(encoded) == 4
    [(start, end)] = encoded.spans
    assert base.processor.tokenizer.decode(encoded.input_ids[start:end]) == "tea<|im_end|>"


def test_nemotron_parse_s_decoder_begins_with_its_two_tokens_and_the_task(tiny_base):
    base = tiny_base("nemotron_parse")
    encoder = Encoder(base.processor, base.family)
    tokens = base.processor.tokenizer
    task = "<predict_bbox><output_markdown>"
    encoded = encoder.training([turn("user", task, 1), turn("assistant", "tea")], [picture(0)])
    assert tokens.decode(encoded.input_ids) == f"</s><s>{task}tea</s>"
    [(start, end)] = encoded.spans
    assert tokens.decode(encoded.input_ids[start:end]) == "tea</s>"
    asked = encoder.prompt([turn("user", task, 1)], [picture(0)])
    assert tokens.decode(asked.input_ids) == f"</s><s>{task}"


def test_nemotron_parse_s_page_stands_in_the_middle_on_white():
    assert fitting_size(3000, 2000, 2048, 1648) == (2048, 1365)
    assert fitting_size(1000, 3000, 2048, 1648) == (549, 1648)
    assert fitting_size(100, 100, 2048, 1648) == (100, 100)
    images = NemotronParseImages(size={"height": 40, "width": 60}, do_rescale=False)
    source = picture(3, 80, 80)
    [page] = images([source], return_tensors="np")["pixel_values"]
    assert page.shape == (3, 40, 60)
    assert (page[:, :, :10] == 255).all() and (page[:, :, 50:] == 255).all()
    pixels = torch.from_numpy(np.asarray(source).copy()).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels, size=(40, 40), mode="bilinear")[0].numpy()
    assert np.abs(page[:, :, 10:50].astype(float) - expected).max() <= 1
