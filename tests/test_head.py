"""Folders that are no sweep's of ours: one clear line and status 2, whatever the command."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from made import experiment
from test_search_limits import RANKS

from raytune_vlm import __version__
from raytune_vlm.cli import cli
from raytune_vlm.errors import CheckpointError, ConfigError, DataError, LeaseError, RaytuneVlmError
from raytune_vlm.records import SweepFolder, write_json
from raytune_vlm.sweep.head import experiment_in
from raytune_vlm.sweep.warm_start import check_warm_start

PLAIN = experiment().model_dump(mode="json")
FOREIGN = {
    "torn": ("{torn", "is not as a sweep writes it: Expecting property name"),
    "empty": ("", "is not as a sweep writes it: Expecting value"),
    "list": ("[1]", "is not as a sweep writes it: an object is expected, not list"),
    "binary": (b"\xff\xfe\x00", "is not as a sweep writes it: 'utf-8' codec can't decode"),
    "another program's": ('{"name": "x"}', "experiment: is missing or of another kind"),
    "a number": ('{"experiment": 3}', "experiment: is missing or of another kind"),
}
COMMANDS = {
    "resume": [], "rescore": [], "export": ["--output", "new"], "evaluate": [], "status": [],
}  # fmt: skip


def told(*arguments: object) -> str:
    """The one line with which a command refuses."""
    error = CliRunner().invoke(cli, [*map(str, arguments)]).exception
    assert isinstance(error, RaytuneVlmError), repr(error)
    assert error.exit_status == 2 and "\n" not in error.message
    return error.message


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_not_ours_is_one_line(tmp_path, kind):
    content, why = FOREIGN[kind]
    file = SweepFolder(tmp_path).experiment_file
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command, options in COMMANDS.items():
        assert told(command, tmp_path, *options).startswith(f"{file}: {why}"), command
    assert told("control", tmp_path, "stop").startswith(f"{file}: {why}")
    config = experiment(sweep={"warm_start": [str(tmp_path)], "search_space": RANKS})
    with pytest.raises(ConfigError) as caught:
        check_warm_start(config)
    assert caught.value.message.startswith(f"sweep.warm_start: {file}: {why}")
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("key", ["fingerprint", "data", "versions"])
def test_a_resume_needs_all_that_a_sweep_writes(tmp_path, key):
    folder = SweepFolder(tmp_path)
    head = {"experiment": PLAIN, "fingerprint": "x", "data": "x", "versions": {}}
    del head[key]
    write_json(folder.experiment_file, head)
    assert told("resume", tmp_path).startswith(f"{folder.experiment_file}: {key}: is missing")


def test_another_version_is_named(tmp_path):
    folder = SweepFolder(tmp_path)
    head = {"experiment": {**PLAIN, "newer": 1}, "versions": {"raytune-vlm": "99.1"}}
    write_json(folder.experiment_file, head)
    message = told("rescore", tmp_path)
    written = f"(written by raytune-vlm 99.1, this is {__version__})"
    assert message.startswith(f"{folder.experiment_file} {written}: newer: unknown key")
    write_json(folder.experiment_file, {**head, "experiment": PLAIN})
    assert experiment_in(folder, name="y").name == "y"


@pytest.mark.parametrize("content", ["{torn", "[]", "{}"])
def test_a_lease_or_a_result_of_others_is_one_line(tmp_path, content):
    folder = SweepFolder(tmp_path)
    write_json(folder.experiment_file, {"experiment": PLAIN})
    folder.result_file.write_text(content)
    folder.best.mkdir()
    (folder.best / "README.md").write_text("")
    for command in ("resume", "status"):
        assert told(command, tmp_path).startswith(f"{folder.result_file}: is not as a sweep writes")
    with pytest.raises(DataError, match="is not as a sweep writes it"):
        folder.result()

    folder.result_file.unlink()
    folder.lease_file.write_text(content)
    assert told("status", tmp_path).startswith(f"{folder.lease_file}: is not as a driver writes it")
    with pytest.raises(LeaseError, match="remove that file"):
        raise CliRunner().invoke(cli, ["control", str(tmp_path), "stop"]).exception
    assert folder.lease_file.read_text() == content


def test_a_damaged_ledger_is_told_before_anything_starts(tmp_path):
    folder = SweepFolder(tmp_path)
    config = experiment()
    write_json(
        folder.experiment_file,
        {
            "experiment": config.model_dump(mode="json"),
            "fingerprint": config.fingerprint(),
            "data": "x",
            "versions": {},
        },
    )
    folder.ledger_file.write_text("x\n" + json.dumps({"seq": 2}) + "\n")
    for command in ("resume", "status", "logs"):
        error = CliRunner().invoke(cli, [command, str(tmp_path)]).exception
        assert isinstance(
            error, CheckpointError
        ) and "ledger.jsonl:1: the ledger is damaged" in str(error)
