"""Export: PEFT and transformers load what was written, with the same answers; clear refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from made import experiment, run_cli
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from raytune_vlm.cli import cli
from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import CheckpointError, ConfigError, ModelError
from raytune_vlm.models.export import write_merged
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.records import (
    MetricEstimate,
    Scores,
    SweepFolder,
    SweepResult,
    TrialRecord,
    write_json,
)
from raytune_vlm.sweep.export import export
from raytune_vlm.train.checkpoint import load_adapter
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

METRIC = "cer@micro"


def scores_of(trial_id, split, step, value):
    estimate = MetricEstimate(value, value - 0.1, value + 0.1, 0.05)
    return Scores(
        trial_id=trial_id,
        step=step,
        split=split,
        metrics={METRIC: estimate},
        num_samples=8,
        num_groups=8,
        parse_failure_rate=0.0,
        empty_rate=0.0,
        truncation_rate=0.0,
    )


@pytest.fixture(scope="module")
def swept(tiny_model, tiny_base, tiny_split, tmp_path_factory):
    """A sweep folder with two trained trials (LoRA, DoRA), the first the winner at step 4."""
    root = tmp_path_factory.mktemp("runs") / "small"
    train = {"max_steps": 6, "warmup_steps": 0, "batch_size": 4, "learning_rate": 1e-1}
    resolved = experiment(
        tiny_model("idefics3"),
        name="small",
        lora={"rank": 4, "scope": "text+vision"},
        train={**train, "micro_batch_size": 4},
        evaluation={"metrics": [METRIC]},
    )
    folder = SweepFolder(root)
    plain = {"fingerprint": "f" * 8, "experiment": resolved.model_dump(mode="json")}
    write_json(folder.experiment_file, {**plain, "versions": {}, "command": "raytune-vlm sweep"})
    base = tiny_base("idefics3")
    for number, recipe in enumerate(({}, {"lora.dora": True})):
        trial_id = f"t000{number}"
        trial = folder.trial(trial_id)
        own = resolved.with_recipe(recipe)
        run = Run(base, tiny_split("idefics3"), own, World(), TrainingData("d"))
        try:
            while run.steps_done < 6:
                run.step()
                if run.steps_done in (2, 4, 6):
                    run.save(trial.checkpoint(run.steps_done))
        finally:
            run.close()
        write_json(trial.record_file, TrialRecord(trial_id, number, recipe, "finished", 6, 6))
        for step, value in ((2, 0.9), (4, 0.5), (6, 0.7)):
            file = trial.evaluation("select", step) / "scores.json"
            write_json(file, scores_of(trial_id, "select", step, value))
    write_json(
        folder.trial("t0000").evaluation("report", 4) / "scores.json",
        scores_of("t0000", "report", 4, 0.55),
    )
    shutil.copytree(root, root.parent / "undecided")
    result = SweepResult(
        metric=METRIC,
        mode="min",
        winner="t0000",
        winner_step=4,
        default=None,
        naive=0.5,
        corrected=None,
        report={"winner": "t0000"},
        paired=[],
        indistinguishable=["t0000"],
        num_report_touches=1,
        seconds=5.0,
    )
    write_json(folder.result_file, result)
    return folder


@pytest.fixture
def batch(tiny_base, tiny_split):
    base = tiny_base("idefics3")
    split = tiny_split("idefics3")
    rows = [split.encoded(row) for row in (0, 5)]
    made = collate(rows, base.family, pad_token_id=0, padding_side="left")
    del made["labels"]
    return PixelTable(base.processor.image_processor, base.family)(made)


@torch.no_grad()
def answers(model, batch):
    model.eval()
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=12)
    return model(**batch).logits, tokens


def in_memory(swept, base, batch, trial_id, step):
    """Logits and tokens of a checkpoint as the program itself evaluates it."""
    recipe = swept.trial(trial_id).record().recipe
    lora = experiment(lora={"rank": 4, "scope": "text+vision"}).with_recipe(recipe).lora
    adapted = attach(base.model, base.family, lora, seed=9)
    try:
        load_adapter(swept.trial(trial_id).checkpoint(step), adapted)
        return answers(adapted, batch)
    finally:
        base.model = detach(adapted)


@pytest.mark.parametrize("trial_id", ["best", "t0001"])
def test_an_exported_adapter_loads_with_peft_and_answers_identically(
    trial_id, swept, tiny_base, batch, tmp_path
):
    written = export(swept.root, tmp_path / "out", trial_id=trial_id, form="adapter")
    assert (written.trial_id, written.step) == ("t0001" if trial_id == "t0001" else "t0000", 4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    plain = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"])
    bare, _ = answers(plain, batch)
    logits, tokens = answers(PeftModel.from_pretrained(plain, tmp_path / "out"), batch)
    expected, expected_tokens = in_memory(
        swept, tiny_base("idefics3"), batch, written.trial_id, written.step
    )
    assert torch.equal(logits, expected) and torch.equal(tokens, expected_tokens)
    assert not torch.equal(logits, bare)
    AutoProcessor.from_pretrained(tmp_path / "out")
    resolved = load_experiment(tmp_path / "out" / "experiment.yaml")
    assert resolved.lora.dora is (trial_id == "t0001") and resolved.sweep.search_space == {}
    problems = written.serving.problems
    assert problems == (("vLLM has no DoRA",) if trial_id == "t0001" else ())


@pytest.mark.parametrize("trial_id", ["best", "t0001"])
def test_a_merged_model_loads_with_transformers_and_generates_the_same(
    trial_id, swept, tiny_base, batch, tmp_path
):
    written = export(swept.root, tmp_path / "out", trial_id=trial_id, form="merged")
    assert written.serving is None
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    logits, tokens = answers(merged, batch)
    expected, expected_tokens = in_memory(swept, tiny_base("idefics3"), batch, written.trial_id, 4)
    assert torch.equal(tokens, expected_tokens)
    assert torch.allclose(logits, expected, atol=1e-4)
    AutoProcessor.from_pretrained(tmp_path / "out")
    matter = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert matter["library_name"] == "transformers" and "peft" not in matter["tags"]


def test_steps_are_chosen_and_a_sweep_without_a_winner_asks_for_a_trial(swept, tmp_path):
    written = export(swept.root, tmp_path / "six", step=6, form="adapter")
    assert written.step == 6
    assert "not the winner" in (tmp_path / "six" / "README.md").read_text()
    undecided = swept.root.parent / "undecided"
    with pytest.raises(ConfigError, match="no winner yet; give --trial: t0000, t0001"):
        export(undecided, tmp_path / "none", form="adapter")
    assert export(undecided, tmp_path / "named", trial_id="t0000", form="adapter").step == 4


def test_wrong_use_is_refused_and_nothing_is_left(swept, tmp_path):
    output = tmp_path / "here" / "out"
    with pytest.raises(ConfigError, match=r"no trial 't0002' \(did you mean 't0001'\?\)"):
        export(swept.root, output, trial_id="t0002", form="adapter")
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5 \(it has: 2, 4, 6\)"):
        export(swept.root, output, step=5, form="adapter")
    with pytest.raises(ConfigError, match="is not a sweep folder"):
        export(tmp_path, output, form="adapter")
    assert not output.parent.exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="there is something already"):
        export(swept.root, full, form="adapter")
    assert [file.name for file in full.iterdir()] == ["mine.txt"]


def test_a_damaged_checkpoint_is_not_exported(swept, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(swept.root, root)
    weights = SweepFolder(root).trial("t0000").checkpoint(4) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match="was altered"):
        export(root, tmp_path / "out" / "adapter", form="adapter")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_quantised_base_is_not_merged_into(swept, tiny_model, tmp_path):
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_model("idefics3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised.*use --format adapter"):
        write_merged(
            swept.trial("t0000").checkpoint(4), ModelConfig(name=str(folder)), tmp_path / "out"
        )


def test_the_command_line_writes_says_and_refuses(swept, tmp_path):
    arguments = ["export", str(swept.root), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    first, second = done.output.strip().splitlines()
    assert first == f"t0000, step 4: adapter in {tmp_path / 'out'}"
    assert "--max-lora-rank 8 --enable-tower-connector-lora --lora-modules out=" in second
    again = [*arguments[:3], str(tmp_path / "dora"), "--trial", "t0001"]
    assert "not for vLLM: vLLM has no DoRA" in CliRunner().invoke(cli, again).output
    refused = run_cli(*arguments, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "there is something already" in refused.stderr


def test_cards_are_valid_for_the_hub_and_honest(swept, tmp_path):
    file = swept.experiment_file
    head = json.loads(file.read_text())
    named = {**head, "experiment": json.loads(json.dumps(head["experiment"]))}
    named["experiment"]["model"]["name"] = "some/base-model"
    from raytune_vlm.report.model_card import model_card

    root = tmp_path / "named"
    shutil.copytree(swept.root, root)
    write_json(root / "experiment.json", named)
    winner = ModelCard(model_card(SweepFolder(root), place="out"))
    assert winner.data.base_model == "some/base-model"
    assert winner.data.eval_results[0].metric_value == 0.55
    assert '(base, "out")' in winner.text or "(base, 'out')" in winner.text
    other = ModelCard(model_card(SweepFolder(root), "t0001", 4))
    assert other.data.eval_results is None
    assert "which the search saw" in other.text and "expect less than this" in other.text
    local = yaml.safe_load(model_card(swept).split("---\n")[1])
    assert "base_model" not in local
