"""A sweep folder in an object store: copied as it grows, brought back whole."""

from __future__ import annotations

import shutil
import time
import uuid
from pathlib import Path

import pytest
from made import experiment
from sweep_folder_example import build_example
from test_remote_sources import endpoint, point_to, store  # noqa: F401 - fixtures

from raytune_vlm.errors import ConfigError, InfrastructureError
from raytune_vlm.monitor import Monitor
from raytune_vlm.sweep import folder_copy
from raytune_vlm.sweep.folder_copy import FolderCopy, bring_back, copied
from raytune_vlm.sweep.ledger import Ledger, replay


def files(root: Path) -> dict[str, bytes]:
    names = (file for file in root.rglob("*") if file.is_file())
    return {
        name.relative_to(root).as_posix(): name.read_bytes()
        for name in names
        if name.name not in ("study.db", "lease.json")
    }


class Said(Monitor):
    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, message):
        self.lines.append(message)


@pytest.fixture
def example(tmp_path):
    folder = build_example(tmp_path / "runs" / "sweep", state="running")
    folder.ledger_file.unlink()
    Ledger(folder.ledger_file).append("proposed", trial_id="t0000", number=0, recipe={})
    return folder


@pytest.fixture
def url(store):  # noqa: F811
    bucket = f"sweeps-{uuid.uuid4().hex[:8]}"
    store.create_dir(bucket)
    return f"s3://{bucket}/ours/sweep"


@pytest.fixture
def config(url):
    return experiment(name="sweep", storage_copy=url.removesuffix("/sweep"))


def test_what_grows_and_what_goes_is_copied(example, config, url, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_copy, "EVERY_S", 0.1)
    said = Said()
    with copied(example, config, said, new=True):
        Ledger(example.ledger_file).append("noted", trial_id="t0000", message="on the way")
        added = example.trial("t0000").checkpoint(7) / "state.json"
        added.parent.mkdir(parents=True)
        added.write_text("{}")
        time.sleep(0.5)
        shutil.rmtree(added.parent)
        (example.data / "plan.json").write_text('{"digest": "other"}')
    back = bring_back(url, tmp_path / "elsewhere")
    assert back == tmp_path / "elsewhere" / "sweep"
    assert files(back) == files(example.root)
    assert replay(back / "ledger.jsonl").keys() == replay(example.ledger_file).keys()
    assert said.lines == [f"copy: {example.root} is copied to {url}"]


def test_a_copied_ledger_speaks_of_nothing_that_is_not_there(example, config, url, tmp_path):
    copy = FolderCopy(example, url)
    copy.sync()
    write, seen = copy._write, []

    def and_then_the_sweep_goes_on(name, content):
        seen.append(name)
        Ledger(example.ledger_file).append("noted", trial_id="t0000", message="later")
        write(name, content)

    copy._write = and_then_the_sweep_goes_on
    before = example.ledger_file.read_bytes()
    (example.data / "manifest.json").touch()
    (example.data / "plan.json").touch()
    copy.sync()
    assert seen == ["data/plan.json", "data/manifest.json", "ledger.jsonl"]
    back = bring_back(url, tmp_path / "elsewhere")
    assert (back / "ledger.jsonl").read_bytes() == before


def test_a_store_that_fails_in_between_is_told_and_caught_up_with(
    example,
    config,
    monkeypatch,
    endpoint,  # noqa: F811
):
    monkeypatch.setattr(folder_copy, "EVERY_S", 0.1)
    said, sync, broken = Said(), FolderCopy.sync, []

    def failing(self):
        if broken:
            raise OSError("the store is away")
        sync(self)

    monkeypatch.setattr(FolderCopy, "sync", failing)
    with copied(example, config, said, new=True):
        broken.append(True)
        time.sleep(0.5)
        broken.clear()
        time.sleep(0.5)
    assert [line.split(":")[1].strip() for line in said.lines[1:]] == ["WARNING", "s3"]
    with (
        pytest.raises(InfrastructureError, match="cannot be reached: OSError: the store is away"),
        copied(example, config, said, new=False),
    ):
        broken.append(True)


def test_another_sweep_is_not_overwritten(example, config, url, tmp_path, monkeypatch):
    with copied(example, config, Said(), new=True):
        pass
    with (
        pytest.raises(ConfigError, match="sweep holds a sweep already: `raytune-vlm resume s3"),
        copied(example, config, Said(), new=True),
    ):
        pass
    with pytest.raises(ConfigError, match="is there already"):
        bring_back(url, tmp_path / "runs")
    with pytest.raises(ConfigError, match="sweeps is not a sweep folder"):
        bring_back(f"{url}s", tmp_path / "elsewhere")
    point_to(monkeypatch, "http://127.0.0.1:9")
    with (
        pytest.raises(ConfigError, match="ours/sweep cannot be reached"),
        copied(example, config, Said(), new=True),
    ):
        pass
