"""Rows of JSON lines, JSON and Parquet files: what is damaged, how files are cut."""

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import LIMITS, MODELS, config_of, lines, png, read, reasons, row_of, shards_of

from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import SOURCES
from raytune_vlm.sources.containers import json_lines


def test_malformed_lines_are_named_and_passed(tmp_path: Path) -> None:
    good = row_of("image_text", 0)
    (tmp_path / "image0.png").write_bytes(png())
    file = lines(tmp_path / "x.jsonl", good, '{"a": 1,, }', "", "[1]", good)
    with file.open("ab") as stream:
        stream.write(b'{"text": "\xff"}\n' + b"[" * 100_000 + b"\n" + json.dumps(good).encode())
    found = read("image_text", file, tmp_path)
    assert [type(item) for item in found] == [
        Sample,
        *[Quarantined] * 2,
        Sample,
        *[Quarantined] * 2,
        Sample,
    ]
    assert isinstance(found[1], Quarantined)
    assert found[1].origin == "x.jsonl:2"
    assert found[1].reason.startswith("malformed JSON: ")
    assert found[1].reason.endswith("at column 9")
    assert reasons(found)[2] == "the row must be an object, not list"
    assert "not UTF-8" in reasons(found)[4]


def test_overlong_lines_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 200)
    good = {"image": "data:;base64," + base64.b64encode(png()).decode()[:8], "text": "x"}
    file = lines(tmp_path / "x.jsonl", good, '{"a": "' + "b" * 1000 + '"}', good)
    assert reasons(read("image_text", file, tmp_path)) == [
        "",
        "the line has more than 200 bytes",
        "",
    ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".ndjson", ".parquet"])
def test_the_same_rows_in_every_container(suffix: str, tmp_path: Path) -> None:
    values = [{"image": {"bytes": None, "path": f"{n}.png"}, "text": f"t{n}"} for n in range(3)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    file = tmp_path / f"x{suffix}"
    text = "\n".join(map(json.dumps, values)).encode()
    if suffix == ".json":
        file.write_text("\ufeff" + json.dumps(values), encoding="utf-8")
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), file)
    else:
        file.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    found = read("image_text", file, tmp_path)
    assert [item.answer for item in found if isinstance(item, Sample)] == ["t0", "t1", "t2"]
    assert [item.origin for item in found] == [f"x{suffix}:{n}" for n in (1, 2, 3)]


def parquet(file: Path, count: int, group: int = 100, **extra: list[Any]) -> Path:
    table = pa.table(
        {
            "image": [{"bytes": png(n % 250), "path": "x"} for n in range(count)],
            "text": [f"t{n}" for n in range(count)],
            **extra,
        }
    )
    pq.write_table(table, file, row_group_size=group, compression="none", use_dictionary=False)
    return file


def test_parquet_is_cut_at_row_groups_and_numbered_through(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", 1300)
    config = MODELS["image_text"](type="image_text", path="x.parquet", max_samples=1250)
    shards = SOURCES["image_text"].list_shards(config, tmp_path, False)
    assert [(shard.first_row, shard.limit) for shard in shards] == [
        (1, 600),
        (601, 600),
        (1201, 50),
    ]
    found = read("image_text", file, tmp_path)
    assert [item.origin for item in found] == [f"x.parquet:{n}" for n in range(1, 1301)]


def test_a_truncated_parquet_file_is_one_quarantined(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", 10)
    file.write_bytes(file.read_bytes()[:-20])
    parquet(tmp_path / "y.parquet", 2)
    found = read("image_text", ".", tmp_path)
    assert [type(item) for item in found] == [Quarantined, Sample, Sample]
    assert found[0].origin == "x.parquet"


def test_a_damaged_row_group_costs_only_itself(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", 300)
    meta = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    data[meta.data_page_offset : meta.data_page_offset + 40] = b"\xff" * 40
    file.write_bytes(bytes(data))
    found = read("image_text", file, tmp_path)
    assert sum(isinstance(item, Sample) for item in found) == 200
    assert next(r for r in reasons(found) if r).startswith("unreadable rows as far as 200")


def test_text_that_is_not_utf8_in_parquet_costs_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    images = [{"bytes": png(n), "path": None} for n in range(3)]
    pq.write_table(pa.table({"image": images, "text": text}), tmp_path / "x.parquet")
    found = read("image_text", "x.parquet", tmp_path)
    assert [type(item) for item in found] == [Sample, Quarantined, Sample]


@pytest.mark.parametrize("name", ["gone.jsonl", "x.jsonl.gz", "x.json", "y.json"])
def test_an_unreadable_shard_is_one_quarantined(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "x.json").write_text("[{,]")
    (tmp_path / "y.json").write_text('{"a": 1}\n{"a": 2}')
    (tmp_path / "gone.jsonl").write_text("{}")
    config = MODELS["image_text"](type="image_text", path=name)
    (shard,) = SOURCES["image_text"].list_shards(config, tmp_path, False)
    (tmp_path / "gone.jsonl").unlink()
    (found,) = SOURCES["image_text"].read_shard(config, shard, LIMITS)
    assert isinstance(found, Quarantined)
    assert found.origin == name


def test_a_torn_gzip_keeps_the_rows_before(tmp_path: Path) -> None:
    rows_of = [
        {"image": f"data:;base64,{base64.b64encode(png(n)).decode()}", "text": str(n)}
        for n in range(200)
    ]
    data = gzip.compress("\n".join(map(json.dumps, rows_of)).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(data[: len(data) // 2])
    found = read("image_text", "x.jsonl.gz", tmp_path)
    assert sum(isinstance(item, Quarantined) for item in found) == 1
    assert len(found) > 2
    assert reasons(found)[-1].startswith("unreadable file after row")


# --- JSON lines in pieces


def pairs(count: int) -> list[dict[str, str]]:
    return [{"image": "a.png", "text": f"t{n}"} for n in range(count)]


def test_json_lines_are_cut_at_line_ends_and_numbered_through(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    file = lines(tmp_path / "x.jsonl", *pairs(600), "", "", "{", *pairs(700))
    shards = shards_of("image_text", "x.jsonl", tmp_path)
    assert [shard.first_row for shard in shards] == [1, 513, 1025]
    assert shards[0].start == 0
    assert [shard.end for shard in shards] == [*[s.start for s in shards[1:]], file.stat().st_size]
    found = read("image_text", "x.jsonl", tmp_path)
    assert [item.origin for item in found][598:603] == [
        f"x.jsonl:{number}" for number in (599, 600, 603, 604, 605)
    ]
    assert len(found) == 1301
    (tmp_path / "y.json").write_text(json.dumps(pairs(600)))
    whole = read("image_text", "y.json", tmp_path)
    same = [item.sample_id for item in found[:600] if isinstance(item, Sample)]
    assert same == [item.sample_id for item in whole if isinstance(item, Sample)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("end", ["\n", ""])
def test_pieces_do_not_depend_on_how_the_file_is_read(
    chunk: int, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "ROWS_PER_SHARD", 5)
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 40)
    rows = [json.dumps({"text": "x" * length}) for length in (0, 50, 3, 3, 90, 1, 1, 1, 1, 1, 1, 1)]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(rows) + end)
    expected = shards_of("image_text", "x.jsonl", tmp_path)
    assert [shard.first_row for shard in expected] == [1, 3, 6, 9, 12]
    monkeypatch.setattr(json_lines, "_CHUNK_BYTES", chunk)
    assert shards_of("image_text", "x.jsonl", tmp_path) == expected
    data = file.read_bytes()
    for shard in expected:
        content = data[shard.start : shard.end]
        assert shard.digest == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_appending_changes_nothing_but_the_last_piece(tmp_path: Path) -> None:
    file = lines(tmp_path / "x.jsonl", *pairs(1100))
    before = shards_of("image_text", "x.jsonl", tmp_path)
    with file.open("a") as stream:
        stream.write(json.dumps(pairs(1)[0]) + "\n")
    after = shards_of("image_text", "x.jsonl", tmp_path)
    assert before[:2] == after[:2]
    assert before[2].digest != after[2].digest


def test_max_samples_cuts_no_further_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines(tmp_path / "x.jsonl", *pairs(520), "", *pairs(2000))
    shards = shards_of("image_text", "x.jsonl", tmp_path, max_samples=600)
    assert [shard.limit for shard in shards] == [512, 88]
    found = read("image_text", "x.jsonl", tmp_path, max_samples=600)
    assert [item.origin for item in found][-1] == "x.jsonl:601"


def test_a_file_that_changes_after_it_was_listed_is_told(tmp_path: Path) -> None:
    file = lines(tmp_path / "x.jsonl", *pairs(3))
    (shard,) = shards_of("image_text", "x.jsonl", tmp_path)
    lines(file, *reversed(pairs(3)))
    found = list(SOURCES["image_text"].read_shard(config_of("image_text", file), shard, LIMITS))
    assert reasons(found)[-1] == (
        "unreadable file after row 3: the file has changed since it was listed"
    )


# --- Arrow


def arrow(file: Path, batches: int, rows: int, *, stream: bool = True) -> Path:
    table = pa.table(
        {
            "image": [{"bytes": png(n % 250), "path": None} for n in range(rows)],
            "text": [f"t{n}" for n in range(rows)],
        }
    )
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(file), table.schema) as writer:
        for _ in range(batches):
            writer.write_table(table)
    return file


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_is_cut_at_record_batches(stream: bool, tmp_path: Path) -> None:
    arrow(tmp_path / "x.arrow", 3, 300, stream=stream)
    shards = shards_of("image_text", "x.arrow", tmp_path)
    assert [(s.row_groups, s.first_row) for s in shards] == [((0, 1), 1), ((2,), 601)]
    found = read("image_text", "x.arrow", tmp_path)
    assert [item.origin for item in found] == [f"x.arrow:{n}" for n in range(1, 901)]
    assert all(isinstance(item, Sample) for item in found)
    assert len(read("image_text", "x.arrow", tmp_path, max_samples=601)) == 601


def test_a_truncated_arrow_file_keeps_the_batches_before(tmp_path: Path) -> None:
    file = arrow(tmp_path / "x.arrow", 3, 10)
    file.write_bytes(file.read_bytes()[:-400])
    found = read("image_text", "x.arrow", tmp_path)
    assert [type(item) for item in found] == [Sample] * 20 + [Quarantined]
    assert reasons(found)[-1].startswith("unreadable file after row 20: ")
    file.write_bytes(b"")
    (bad,) = reasons(read("image_text", "x.arrow", tmp_path))
    assert bad.startswith("unreadable file: ")


def test_arrow_offsets_that_lie_cost_their_row(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2**30, 3], np.int32).tobytes())
    text = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"abc"))
    images = pa.array([png(n) for n in range(3)])
    batch = pa.record_batch([images, text], ["image", "text"])
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    found = read("image_text", "x.arrow", tmp_path)
    assert [type(item) for item in found] == [Sample, Quarantined, Quarantined]
    assert reasons(found)[1].startswith("unreadable row")


class PickledType(pa.ExtensionType):
    """Stands for Ray's: its values are pickles."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "raytune_vlm.tests.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Any:
        return cls()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_extension_types_are_not_read(suffix: str, nested: bool, tmp_path: Path) -> None:
    column = pa.ExtensionArray.from_storage(PickledType(), pa.array([b"x"], pa.binary()))
    if nested:
        column = pa.StructArray.from_arrays([column], ["inner"])
    table = pa.table({"image": [png()], "text": column, "other": ["t"]})
    pa.register_extension_type(PickledType())
    try:
        if suffix == "parquet":
            pq.write_table(table, tmp_path / "x.parquet")
        else:
            with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
                writer.write_table(table)
        (bad,) = reasons(read("image_text", f"x.{suffix}", tmp_path))
        assert "column 'text' holds the extension type 'raytune_vlm.tests.pickled'" in bad
        (good,) = read("image_text", f"x.{suffix}", tmp_path, text_column="other")
        assert isinstance(good, Sample)
    finally:
        pa.unregister_extension_type("raytune_vlm.tests.pickled")
