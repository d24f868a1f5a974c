"""Dashboards and alerts: as generated, of gauges that exist, and understood by promtool."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from watched import METRIC, Watched, config

from raytune_vlm.records import DataManifest, SplitStatistics
from raytune_vlm.sweep.gauges import OF_SWEEPS, OF_TRIALS
from raytune_vlm.sweep.ledger import events
from raytune_vlm.sweep.tally import STATES, Tally, data_figures, executor_figures
from raytune_vlm.train.step_metrics import StepMetrics

DEPLOY = Path(__file__).parents[1] / "deploy"
FILES = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
SOURCE = DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
OF_STEPS = {field.name for field in dataclasses.fields(StepMetrics)}


def panels(file):
    return [x for x in json.loads(file.read_text())["panels"] if x["type"] != "row"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_panels_are_whole_and_ask_for_gauges_that_exist(file):
    board = json.loads(file.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and board["uid"] == f"raytune-vlm-{file.stem}"
    for panel in panels(file):
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] and defaults["thresholds"]["steps"] and panel["title"]
        assert (
            panel["datasource"]["uid"]
            in (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
        )
        for target in panel["targets"]:
            assert_known(target["expr"])
            by = re.search(r"by \(([^)]*)\)", target["expr"])
            for label in re.findall(r"{{(\w+)}}", target.get("legendFormat", "")):
                assert label in by[1]


def assert_known(expr):
    """Every gauge of ours that an expression names exists, with the labels it is asked by."""
    for by, name in re.findall(r"by \(([^)]*)\) \(ray_raytune_vlm_(\w+)", expr):
        labels = set(by.replace(" ", "").split(",")) - {"sweep"}
        assert name in OF_SWEEPS or name in OF_STEPS
        assert labels <= set(OF_SWEEPS[name][1] if name in OF_SWEEPS else OF_TRIALS)
    assert "ray_raytune_vlm_" not in expr or re.search(r"by \([^)]*\) \(ray_raytune_vlm_", expr)


def test_they_are_what_the_script_writes(tmp_path, monkeypatch):
    pytest.importorskip("grafana_foundation_sdk")
    spec = importlib.util.spec_from_file_location("dashboards", DEPLOY / "dashboards.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dashboards", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    module.main(tmp_path)
    assert len(FILES) == len(module.BOARDS) == 4
    for file in FILES:
        assert (tmp_path / file.name).read_text() == file.read_text(), "run deploy/dashboards.py"


def test_promtool_accepts_the_alerts_and_they_fire():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    folder = DEPLOY / "prometheus"
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for expr in re.findall(r"ray_raytune_vlm_(\w+)", (folder / "alerts.yml").read_text()):
        assert expr in OF_SWEEPS or expr in OF_STEPS


def test_the_gauges_say_what_the_ledger_says(tmp_path):
    watched = Watched(tmp_path)
    watched.first_life()
    watched.second_life()
    watched.tell("failed", "t0001", step=20, message="diverged: loss is nan")
    tally = Tally(config(), watched.folder)
    rows = events(watched.folder.ledger_file)
    for event in rows:
        tally.add(event)
    found = {(name, *tags.values()): value for name, tags, value in tally.figures()}
    assert {state: found["trials", state] for state in STATES if found["trials", state]} == {
        "stopped": 1,
        "failed": 1,
    }
    assert (found["best_score", METRIC], found["best_score_upper", METRIC]) == (0.75, 0.85)
    assert (found["rung_trials", "000010"], found["rung_trials", "000020"]) == (2, 1)
    assert found["failures", "diverged"] == found["resumes",] == 1
    assert found["trial_score", "t0000", METRIC] == 0.5
    assert found["trial_bad_answers", "t0000", "unparsed"] == 0.25
    assert tally.num_ended() == 2 and tally.held_seconds(rows[-1]["time"]) < 60


def test_every_figure_has_a_gauge_with_its_labels(tmp_path):
    assert not OF_SWEEPS.keys() & OF_STEPS, "one name, two gauges"
    watched = Watched(tmp_path)
    watched.first_life()
    tally = Tally(config(), watched.folder)
    for event in events(watched.folder.ledger_file):
        tally.add(event)
    split = SplitStatistics(10, 8, 1, 1, 8, 8, 90, 50.0, 20.0)
    data = DataManifest("d", "s", {"train": split}, {"no image": 1}, {})
    busy = {"t": {"executor": "a", "trial_id": "t", "asked": 8, "answered": 4, "seconds_left": 2.0}}
    for name, tags, _ in [*tally.figures(), *data_figures(data), *executor_figures(busy)]:
        assert set(tags) == set(OF_SWEEPS[name][1])
