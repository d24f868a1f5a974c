"""A model that brings code, on real Ray: data tasks and executors run it, its folder cannot."""

from __future__ import annotations

import shutil

import pytest
from clusters import OF_A_CLUSTER
from made import run_cli

from raytune_vlm.errors import ConfigError
from raytune_vlm.models.trust import OPTION, code_digest
from raytune_vlm.records import SweepFolder, read_json
from raytune_vlm.sweep.runner import recorded_experiment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    *OF_A_CLUSTER,
]


def test_train_with_the_option_and_nothing_after_it_without(tiny_model, tmp_path, write_experiment):
    model = shutil.copytree(tiny_model("kimi_vl"), tmp_path / "model")
    train = {"max_steps": 2, "warmup_steps": 1, "batch_size": 4}
    evaluation = {"metrics": ["cer@micro"], "max_new_tokens": 2, "num_bootstrap": 100}
    sweep = {"num_trials": 1, "search_space": {}, "scheduler": {"type": "fifo"}}
    file, folder = write_experiment(
        model={"name": str(model)}, train=train, evaluation=evaluation, sweep=sweep
    )
    option = f"{model}@{code_digest(model)}"
    run_cli("train", file, OPTION, option)
    head = read_json(SweepFolder(folder).experiment_file)
    assert head["trusted_code"] == code_digest(model)
    assert "trust" not in str(head["experiment"])
    for command in (("resume", folder), ("evaluate", folder), ("train", file)):
        refused = run_cli(*command, check=False)
        assert refused.returncode == 2 and f"{OPTION} {option}" in refused.stderr
    again = recorded_experiment(SweepFolder(folder), option)
    assert again.model.trusted_revision == code_digest(model)
    with (model / "modeling_small.py").open("a") as stream:
        stream.write("# one more line\n")
    with pytest.raises(ConfigError, match="start a new sweep"):
        recorded_experiment(SweepFolder(folder), f"{model}@{code_digest(model)}")
