"""A model that brings code, on real Ray: data tasks and executors run it, its folder cannot."""

from __future__ import annotations

import pytest
from made import run_cli

from raytune_vlm.models.trust import OPTION, code_digest
from raytune_vlm.records import SweepFolder, read_json

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_train_with_the_option_and_nothing_after_it_without(tiny_model, write_experiment):
    model = tiny_model("kimi_vl")
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
    shown = run_cli("evaluate", folder, "--trial", "t0000", OPTION, option).stdout
    assert "cer@micro" in shown
