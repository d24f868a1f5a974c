"""What fuzzing has found: the smallest input of each, refused as it should be."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fuzz_readers import CONFIGS, LIMITS, ROWS, encoded
from PIL import Image
from sweep_folder_example import build_example

from raytune_vlm.config.loader import load_experiment
from raytune_vlm.config.overrides import parse_override
from raytune_vlm.config.sources import LlamaFactorySource, MessagesSource, WebDatasetSource
from raytune_vlm.config.yaml_lines import read_yaml
from raytune_vlm.errors import CheckpointError, ConfigError, DataError
from raytune_vlm.images import ImageError, decode, tiff_length
from raytune_vlm.records import Quarantined
from raytune_vlm.report.html import build_report
from raytune_vlm.report.loading import load_view
from raytune_vlm.sources import SOURCES
from raytune_vlm.sweep.ledger import replay
from raytune_vlm.train import checkpoint
from raytune_vlm.visible import one_line


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail by name what waits for ever: a FIFO without a writer."""

    def fail(number: int, frame: Any) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(config: Any, root: Path) -> list[Any]:
    reader = SOURCES[config.type]
    shards = reader.list_shards(config, root, False)
    return [found for shard in shards for found in reader.read_shard(config, shard, LIMITS)]


# --- what is said -------------------------------------------------------------------------------


def test_errors_and_quarantined_rows_are_lines_that_are_safe_to_show():
    error = pickle.loads(pickle.dumps(ConfigError("a\x1b[2J\nforged", "second\t\ud800")))
    assert str(error) == error.message == "a␛[2J forged\nsecond \\ud800"
    row = Quarantined("a\n:1", "turn 'x\x07' \udcff", "train")
    assert (row.origin, row.reason) == ("a :1", "turn 'x␇' \\udcff")


def test_names_of_thousands_of_characters_are_not_repeated_row_by_row(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"x" * 5000: 1, "b": 2}) + "\n")
    (found,) = read(CONFIGS["image_text"]("x.jsonl"), tmp_path)
    assert found.reason == "no column 'text' (known: b)"


def test_a_key_with_a_line_break_forges_no_second_problem(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text('name: x\n"a\\nerror: \\e[2J": 1\n')
    with pytest.raises(ConfigError) as caught:
        load_experiment(file)
    assert all(line.startswith(str(file)) for line in caught.value.message.split("\n"))
    with pytest.raises(ConfigError) as caught:
        parse_override("a\nerror: forged")
    assert "\n" not in caught.value.message


def test_names_that_are_no_unicode_can_be_written(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text(json.dumps(ROWS["sharegpt"][0]))
    (tmp_path / "0.png").write_bytes(encoded("PNG"))
    (found,) = read(CONFIGS["sharegpt"]("*.jsonl"), tmp_path)
    assert found.origin == "\\udcff.jsonl:1"


# --- files of an experiment ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!int x",
        "!!float ''",
        "!!bool maybe",
        "!!null x",
        "!!str 1",
        "!x y",
        "!!seq [1]",
        "!!map {}",
    ],
)
def test_tags_are_not_allowed(value):
    with pytest.raises(ConfigError, match=r"^f:1: not valid YAML: tag '.*' is not allowed$"):
        read_yaml(f"a: {value}", "f")


def test_numbers_of_thousands_of_digits_are_refused():
    with pytest.raises(ConfigError, match=r"^f:2: b.0: a number of 5000 characters$"):
        read_yaml(f"a: 1\nb: [{'9' * 5000}]", "f")


@pytest.mark.parametrize("text", ['a: "\\uD800"', '"\\uDFFF": 1'])
def test_halves_of_surrogate_pairs_are_refused(text):
    with pytest.raises(ConfigError, match=r"^f:1: .*half of a surrogate pair"):
        read_yaml(text, "f")


# --- sources ------------------------------------------------------------------------------------


def test_a_state_file_whose_names_are_lists(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": []}]}')
    with pytest.raises(DataError, match="which is not there"):
        read(CONFIGS["image_text"]("."), tmp_path)


def test_a_fifo_is_no_file_of_a_source(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": "rows.jsonl"}}')
    for config in (
        MessagesSource(type="messages", path="rows.jsonl"),
        LlamaFactorySource(type="llamafactory", path="."),
        LlamaFactorySource(type="llamafactory", path="dataset_info.json"),
    ):
        with at_most(5), pytest.raises(DataError, match="is neither a file nor a folder"):
            read(config, tmp_path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_would_fill_the_memory(kind, tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 30
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as stream:
        stream.write(header.tobuf())
        for _ in range(16):
            stream.write(b"a" * (1 << 20))
    (found,) = read(WebDatasetSource(type="webdataset", path="x.tar.gz"), tmp_path)
    assert "a header of 1073741824 bytes" in found.reason


# --- images -------------------------------------------------------------------------------------


def test_a_tiff_of_very_many_pages_is_not_counted_to_its_end():
    """Each page is a copy of the first one's directory with the place of the next copy."""
    data = bytearray(encoded("TIFF"))
    (first,) = struct.unpack_from("<I", data, 4)
    (tags,) = struct.unpack_from("<H", data, first)
    directory = bytes(data[first : first + 2 + 12 * tags])
    start = len(data)
    struct.pack_into("<I", data, first + len(directory), start)
    for number in range(1, 40_000):
        data += directory + struct.pack("<I", start + (len(directory) + 4) * number)
    with at_most(5), pytest.raises(ImageError, match="more pages than the limit, 20"):
        tiff_length(bytes(data), max_pages=20)


def test_a_jpeg_of_very_many_scans_is_refused():
    """Each scan costs a pass over all blocks, and takes a few bytes of the file."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, format="JPEG", progressive=True)
    data = buffer.getvalue()
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    assert decode(data, LIMITS).size == (64, 64)
    with pytest.raises(ImageError, match="scans"):
        decode(data[:start] + scan * 5000 + data[-2:], LIMITS)


# --- ledgers and checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "proposed", "trial_id": "t"},
        {"event": "scored", "trial_id": "t", "step": 1, "scores": {}},
        {"event": "promoted", "trial_id": ["t"]},
        {"event": "stopped"},
        {"event": "control"},
        {"event": "control", "accepted": True, "command": "clone", "clone": {"x": 1}},
        {"event": "control", "accepted": True, "command": "pin", "trial_id": "t"},
    ],
)
def test_an_event_that_lacks_something_is_named_with_its_line(event, tmp_path):
    file = tmp_path / "ledger.jsonl"
    file.write_text(json.dumps({"seq": 1, "time": 0, "event": "planned"}) + "\n")
    with file.open("a") as stream:
        stream.write(json.dumps({"seq": 2, **event}) + "\n")
    with pytest.raises(CheckpointError, match=r"\.jsonl:2: the ledger is damaged in this line"):
        replay(file)


def test_a_ledger_that_is_nested_too_deeply(tmp_path):
    file = tmp_path / "ledger.jsonl"
    file.write_text("[" * 100_000 + "\n" + "x\n")
    with pytest.raises(CheckpointError, match=":1: the ledger is damaged"):
        replay(file)


def _manifest(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    return folder


EMPTY = hashlib.sha256(b"").hexdigest()
_LISTED = ("adapter_model.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "3",
        json.dumps(_LISTED),
        json.dumps(dict.fromkeys(_LISTED)),
        json.dumps({name: {"bytes": 1} for name in _LISTED}),
        json.dumps({name: {"bytes": 0, "sha256": EMPTY} for name in (*_LISTED, "../x")}),
    ],
)
def test_manifests_that_say_something_else(content, tmp_path):
    folder = _manifest(tmp_path / "step_000001", content)
    for name in _LISTED:
        (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.verify(folder)


def test_a_fifo_is_no_file_of_a_checkpoint(tmp_path):
    folder = tmp_path / "step_000001"
    folder.mkdir()
    os.mkfifo(folder / "manifest.json")
    with at_most(5), pytest.raises(CheckpointError, match="no manifest"):
        checkpoint.verify(folder)
    (folder / "manifest.json").unlink()
    listed = json.dumps({name: {"bytes": 0, "sha256": EMPTY} for name in _LISTED})
    (folder / "manifest.json").write_text(listed)
    os.mkfifo(folder / _LISTED[0])
    with at_most(5), pytest.raises(CheckpointError, match="missing"):
        checkpoint.verify(folder)


def test_a_folder_that_is_no_step_is_no_checkpoint(tmp_path):
    (tmp_path / "step_000001.bak").mkdir()
    assert checkpoint.newest(tmp_path) == (None, [])


# --- sweep folders ------------------------------------------------------------------------------


def test_fifos_in_a_sweep_folder_do_not_stop_the_report(tmp_path):
    folder = build_example(tmp_path / "sweep", state="single")
    kinds = (".parquet", ".jpg", ".jsonl")
    found = [file for file in folder.root.rglob("*") if file.suffix in kinds]
    plot = folder.report / "plots" / "panels-train-learning-rate.png"
    plot.parent.mkdir(parents=True)
    os.mkfifo(plot)
    assert {file.suffix for file in found} == set(kinds)
    for file in found:
        file.unlink()
        os.mkfifo(file)
    with at_most(60):
        page = build_report(folder.root, png=True).read_text()
    assert "metrics.jsonl is no regular file" in page


@pytest.fixture(scope="module")
def one_trial(tmp_path_factory):
    """A sweep folder of one trial; its files are put back by whoever changes them."""
    return build_example(tmp_path_factory.mktemp("found") / "sweep", state="single")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"metric": 3}'),
        ("result.json", "[" * 100_000),
        ("result.json", '{"\\u001b[2J\\n": 1}'),
        ("ledger.jsonl", "null\n{}\n"),
        ("ledger.jsonl", '{"event": "infeasible"}\n'),
        ("ledger.jsonl", '{"time": 1e300}\n'),
        ("ledger.jsonl", '{"clone": {"trial_id": []}}\n'),
        ("trials/trial_000/metrics.jsonl", "3\n{}\n"),
        ("trials/trial_000/trial.json", '{"trial_id": "x", "number": "one"}'),
        ("data/manifest.json", '{"splits": {"train": {}}}'),
        ("data/quarantine.jsonl", '{"origin": 1, "reason": "r", "split": "train"}\n'),
    ],
)
def test_what_a_report_cannot_read_is_a_note(name, content, one_trial):
    file = one_trial.root / name
    whole = file.read_bytes()
    try:
        file.write_text(content)
        (note,) = load_view(one_trial.root).notes
    finally:
        file.write_bytes(whole)
    assert note.startswith(f"{name} cannot be read") and note == one_line(note)


@pytest.mark.parametrize("content", ["[]", '{"experiment": 3}', "[" * 100_000, "\xff"])
def test_an_experiment_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(DataError, match=r"experiment\.json (is not JSON|holds no experiment)"):
        load_view(tmp_path)
