"""What trackers were told, read back with their own libraries after two lives of a sweep."""

from __future__ import annotations

import pytest
from watched import RECIPES, Watched, config

from raytune_vlm.errors import ConfigError
from raytune_vlm.records import SweepFolder
from raytune_vlm.sweep.ledger import events
from raytune_vlm.sweep.tally import Tally
from raytune_vlm.sweep.trackers import TRACKERS
from raytune_vlm.sweep.trackers.follower import Follower
from raytune_vlm.train import packages

SCORE = "select/exact_match.strip"


def two_lives(root, *trackers):
    """The folder after two lives; in each, trackers are told in several looks."""
    watched, said = Watched(root), []
    settings = config(*trackers)
    for live in (watched.first_life, watched.second_life):
        follower = Follower(watched.folder, settings, said.append)
        follower.look()  # nothing is new, or what the first life left
        with follower:
            live()
    assert said == []
    return watched


@pytest.fixture
def offline(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_tensorboard_has_each_step_once_and_the_recipe_as_hparams(tmp_path, offline):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    two_lives(tmp_path, "tensorboard")
    runs = {}
    for name in (*RECIPES, "sweep"):
        runs[name] = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / name))
        runs[name].Reload()
    steps = {name: [x.step for x in runs[name].Scalars("train/loss")] for name in RECIPES}
    assert steps == {"t0000": [*range(1, 15)], "t0001": [*range(1, 21)]}
    assert [(x.step, x.value) for x in runs["t0001"].Scalars(SCORE)] == [(10, 0.5), (20, 0.75)]
    assert runs["sweep"].Scalars("winner/naive")[0].value == 0.75
    for name, recipe in RECIPES.items():
        data = runs[name].SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        found = HParamsPluginData.FromString(data).session_start_info.hparams
        assert found.keys() == recipe.keys()
        assert found["lora.rank"].number_value == recipe["lora.rank"]
        assert "_hparams_/session_end_info" in runs[name].summary_metadata


def test_a_clone_is_shown_like_a_trial_that_was_proposed(tmp_path, offline):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watched, tally = Watched(tmp_path), Tally(config(), SweepFolder(tmp_path))
    with Follower(watched.folder, config("tensorboard"), print):
        watched.first_life()
        clone = {"trial_id": "t0002", "number": 2, "recipe": {"lora.rank": 8}, "promoted_to": 20}
        watched.tell("control", "t0000", command="clone", accepted=True, clone=clone)
        watched.train("t0002", 11, 14)
    for event in events(watched.folder.ledger_file):
        tally.add(event)
    assert tally.states["t0002"] == "waiting"
    run = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "t0002"))
    run.Reload()
    assert [x.step for x in run.Scalars("train/loss")] == [11, 12, 13, 14]


def test_mlflow_has_a_run_for_the_sweep_and_one_below_for_each_trial(tmp_path, offline):
    mlflow = pytest.importorskip("mlflow")

    two_lives(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("test")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"test", *RECIPES}
    parent = runs["test"]
    assert parent.data.params["train.max_steps"] == "20"
    assert parent.data.metrics["report/winner/exact_match.strip"] == 0.7
    assert parent.data.tags["raytune_vlm.winner"] == "t0001"
    assert [runs[name].info.status for name in runs if name != "test"].count("KILLED") == 1
    for name, recipe in RECIPES.items():
        run = runs[name]
        assert run.data.params == {key: str(value) for key, value in recipe.items()}
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [x.step for x in history] == [*range(1, 15 if name == "t0000" else 21)]
        assert [x.value for x in history] == [1 / x.step for x in history]
    history = client.get_metric_history(runs["t0001"].info.run_id, SCORE)
    assert [(x.step, x.value) for x in history] == [(10, 0.5), (20, 0.75)]


def logged(content):
    """The records of an offline run: LevelDB's log format after a header of 7 bytes."""
    place, record = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        if left < 7 or not content[place + 6]:
            place += left
            continue
        record += content[place + 7 : place + 7 + length]
        if content[place + 6] in (1, 4):  # whole, or the last part
            yield record
            record = b""
        place += 7 + length


def test_wandb_has_each_step_once_offline(tmp_path, offline):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    watched = two_lives(tmp_path, "wandb")
    with Follower(watched.folder, config("wandb"), pytest.fail):
        pass  # ended runs are left as they are
    files = {file.stem.rpartition("-")[2]: file for file in tmp_path.glob("wandb/*/run-*.wandb")}
    assert files.keys() == {*RECIPES, "sweep"} and len(list(tmp_path.glob("wandb/off*"))) == 3
    losses, scores = [], []
    for content in logged(files["t0001"].read_bytes()):
        record = Record.FromString(content)
        items = {"/".join([*x.nested_key] or [x.key]): x.value_json for x in record.history.item}
        losses += [int(items["train/step"])] if "train/loss" in items else []
        scores += [(int(items["select/step"]), items[SCORE])] if SCORE in items else []
        if record.run.run_id:
            config_keys = {item.key for item in record.run.config.update}
            assert config_keys >= RECIPES["t0001"].keys() and record.run.run_group == "test"
    assert losses == [*range(1, 21)] and scores == [(10, "0.5"), (20, "0.75")]


def test_a_tracker_that_fails_is_said_and_the_others_go_on(tmp_path, offline, monkeypatch):
    watched, said = Watched(tmp_path), []
    monkeypatch.setitem(TRACKERS, "wandb", "watched:Nothing")
    watched.first_life()
    follower = Follower(watched.folder, config("wandb", "tensorboard"), said.append)
    follower.look()
    follower.look()
    assert len(said) == 1 and "tracker wandb failed and is told nothing more" in said[0]
    assert list((tmp_path / "tensorboard" / "t0001").iterdir())


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report.trackers: mlflow needs mlflow: pip install"):
        packages.check_trackers(config("mlflow").report)
    assert packages.OF_TRACKERS.keys() == TRACKERS.keys()


def test_the_same_tracker_twice_is_refused():
    with pytest.raises(ValueError, match="wandb is listed 2 times"):
        config("wandb", "wandb")


def test_trackers_change_no_fingerprint():
    assert config("mlflow").fingerprint() == config().fingerprint()
