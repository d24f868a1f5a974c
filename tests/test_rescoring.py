"""`raytune-vlm rescore`: from stored answers alone, all alike, variants never mixed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made import experiment

from raytune_vlm.cli import cli
from raytune_vlm.errors import ConfigError, EvaluationError
from raytune_vlm.evaluate.scoring import Prediction, score, write_evaluation
from raytune_vlm.records import SweepFolder, read_json, write_json
from raytune_vlm.sweep.rescoring import rescore_folder


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    """Two evaluations by anls@rrc, the second with a stored score that is wrong."""
    found = SweepFolder(tmp_path / "sweep")
    config = experiment(evaluation={"metrics": ["anls@rrc"], "num_bootstrap": 100})
    write_json(found.experiment_file, {"experiment": config.model_dump(mode="json")})
    answers = [Prediction(f"s{n}", f"s{n}", "q", "paris", "pari", 3, False) for n in range(5)]
    for trial_id, split in (("base", "select"), ("t0000", "report")):
        options: Any = {"confidence": 0.95, "num_bootstrap": 100, "seed": 0, "seconds": 1.0}
        scores, table = score(
            answers,
            trial_id=trial_id,
            step=40,
            split=split,
            metrics=["anls@rrc"],
            answer="text",
            **options,
        )
        write_evaluation(found.trial(trial_id).evaluation(split, 40), scores, table)
    file = found.trial("t0000").evaluation("report", 40) / "scores.json"
    plain = read_json(file)
    plain["metrics"]["anls@rrc"]["value"] = 0.5
    write_json(file, plain)
    return found


def test_old_and_new_are_told(folder: SweepFolder) -> None:
    done = CliRunner().invoke(cli, ["rescore", str(folder.root)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("trials/base/evaluations/select/step_000040: anls@rrc 0.8000")
    assert lines[0].endswith("(as before)") and lines[1].endswith("(was 0.5000)")
    assert lines[2] == "2 evaluations scored again, 1 with other numbers than before"
    assert folder.trial("t0000").scores("report")[0].metrics["anls@rrc"].value == 0.8


def test_metrics_are_added_for_all_alike(folder: SweepFolder) -> None:
    names = ("anls@rrc", "exact_match@strip", "anls@strict")
    lines = list(rescore_folder(folder.root, names))
    assert sum(line.endswith("(new)") for line in lines) == 4
    for trial_id, split in (("base", "select"), ("t0000", "report")):
        assert tuple(folder.trial(trial_id).scores(split)[0].metrics) == names


def test_what_would_mix_variants_is_refused_before_anything_is_written(folder: SweepFolder) -> None:
    with pytest.raises(ConfigError, match="must hold 'anls@rrc', by which this sweep is decided"):
        list(rescore_folder(folder.root, ["exact_match@strip"]))
    list(rescore_folder(folder.root, ["anls@rrc", "vqa@official"]))
    with pytest.raises(ConfigError, match="'vqa@m4c' would take the place of 'vqa@official'"):
        list(rescore_folder(folder.root, ["anls@rrc", "vqa@m4c"]))
    with pytest.raises(ConfigError, match=r"unknown metric 'anls@rc' \(did you mean 'anls@rrc'"):
        list(rescore_folder(folder.root, ["anls@rc"]))
    with pytest.raises(ConfigError, match="not a sweep folder"):
        list(rescore_folder(folder.root / "trials", None))
    file = folder.trial("t0000").evaluation("report", 40) / "predictions.parquet"
    before = (folder.trial("base").evaluation("select", 40) / "scores.json").read_bytes()
    file.write_bytes(b"torn")
    with pytest.raises(EvaluationError, match="cannot read"):
        list(rescore_folder(folder.root, ["anls@rrc"]))
    after = (folder.trial("base").evaluation("select", 40) / "scores.json").read_bytes()
    assert after == before


@pytest.mark.parametrize("command", ["rescore", "resume", "export"])
def test_a_folder_of_another_version_is_one_line(folder: SweepFolder, command: str) -> None:
    head = read_json(folder.experiment_file)
    head["experiment"]["train"]["of_another_version"] = 1
    write_json(folder.experiment_file, head)
    output = ["--output", str(folder.root / "out")] if command == "export" else []
    done = CliRunner().invoke(cli, [command, str(folder.root), *output])
    assert isinstance(done.exception, ConfigError), done.output
    line = f"{folder.experiment_file}: train.of_another_version: unknown key"
    assert str(done.exception).startswith(line)


def test_no_gpu_no_torch_no_ray(folder: SweepFolder) -> None:
    code = (
        "import sys; from raytune_vlm.cli import cli\n"
        f"cli(['rescore', {str(folder.root)!r}], standalone_mode=False)\n"
        "print('heavy', *({'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy"
