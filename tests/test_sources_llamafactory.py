"""LLaMA-Factory's `dataset_info.json`: what an entry may say, and how rows are read by it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import lines, png, read, reasons

from raytune_vlm.errors import DataError
from raytune_vlm.records import Sample

OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def write(folder: Path, entry: Any, *rows: Any, name: str = "mine") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(png())
    (folder / "dataset_info.json").write_text(json.dumps({name: entry}))
    if isinstance(entry, dict) and rows:
        (folder / str(entry["file_name"])).write_text(json.dumps(rows))


def texts(sample: Any) -> list[str]:
    assert isinstance(sample, Sample), sample
    return [
        turn["role"][0] + ":" + "".join(part.get("text", "<image>") for part in turn["content"])
        for turn in sample.messages
    ]


def test_alpaca_by_its_defaults(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "q", "output": "o", "history": [["x", "y"]], "system": "s"}
    write(tmp_path, {"file_name": "x.json"}, row, {**row, "input": ""}, {**row, "input": None})
    found = read("llamafactory", "dataset_info.json", tmp_path)
    assert [texts(item) for item in found] == [
        ["u:i\nq", "a:o"],
        ["u:i", "a:o"],
        ["u:i", "a:o"],
    ]
    assert found[0].origin == "x.json:1"
    assert read("llamafactory", ".", tmp_path, dataset="mine") == found


def test_alpaca_with_all_columns(tmp_path: Path) -> None:
    columns = {
        "prompt": "p",
        "query": "q",
        "response": "r",
        "system": "s",
        "history": "h",
        "images": "pictures",
    }
    row = {
        "p": "<image>i",
        "q": "j",
        "r": "o",
        "s": "be brief",
        "h": [["x", "y"], ["z", "w"]],
        "pictures": ["a.png"],
    }
    write(tmp_path, {"file_name": "x.json", "columns": columns}, row)
    (sample,) = read("llamafactory", tmp_path, Path())
    assert texts(sample) == ["s:be brief", "u:x", "a:y", "u:z", "a:w", "u:<image>i\nj", "a:o"]
    assert isinstance(sample, Sample)
    assert sample.images == [png()]


def test_columns_that_an_entry_does_not_name_are_not_read(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "q", "answer": "o", "system": "s", "images": ["a.png"]}
    entry = {"file_name": "x.json", "columns": {"prompt": "instruction", "response": "answer"}}
    write(tmp_path, entry, row)
    assert [texts(item) for item in read("llamafactory", tmp_path, Path())] == [["u:i", "a:o"]]


def test_sharegpt_with_tags(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]
    entry = {
        "file_name": "x.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images", "system": "about"},
        "tags": OPENAI_TAGS,
    }
    rows = [
        {"messages": turns, "images": ["a.png"], "about": "s"},
        {"messages": [{"role": "system", "content": "t"}, *turns], "images": ["a.png"], "about": 5},
        {"messages": turns, "images": ["a.png"], "about": ""},
    ]
    write(tmp_path, entry, *rows)
    assert [texts(item) for item in read("llamafactory", tmp_path, Path())] == [
        ["s:s", "u:<image>a", "a:b"],
        ["s:t", "u:<image>a", "a:b"],
        ["u:<image>a", "a:b"],
    ]


def test_files_in_folders_and_images_beside_the_info_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    columns = {"prompt": "p", "response": "r", "images": "i"}
    write(data, {"file_name": "deep", "columns": columns})
    (data / "deep").mkdir()
    (data / "deep" / "b.png").write_bytes(png(1))
    row = {"p": "<image>", "r": "x"}
    lines(data / "deep" / "x.jsonl", {**row, "i": ["a.png"]}, {**row, "i": "deep/b.png"})
    pq.write_table(pa.Table.from_pylist([{**row, "i": ["b.png"]}]), data / "deep" / "y.parquet")
    found = read("llamafactory", "data", tmp_path)
    assert reasons(found) == ["", "", ""]
    assert [item.origin for item in found] == [
        "data/deep/x.jsonl:1",
        "data/deep/x.jsonl:2",
        "data/deep/y.parquet:1",
    ]


SHAREGPT = {
    "file_name": "x.json",
    "formatting": "sharegpt",
    "columns": {
        "images": "images",
        "tools": "tools",
        "videos": "videos",
        "audios": "audios",
    },
}
GOOD = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": GOOD}, ""),
        ({"conversations": GOOD, "tools": "[]"}, "the row has tools (column 'tools'), which"),
        ({"conversations": GOOD, "videos": ["v"]}, "the row has videos (column 'videos'), which"),
        ({"conversations": GOOD, "audios": ["v"]}, "the row has audios (column 'audios'), which"),
        ({"conversations": GOOD, "audios": [], "tools": ""}, ""),
        ({"conversations": GOOD, "images": ["a.png"]}, "0 <image> placeholders but 1 image"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, GOOD[1]]},
            "1 <image> placeholder but 0 images",
        ),
        ({"conversations": [GOOD[0], {"from": "function_call", "value": "{}"}]}, "turn 2 is a too"),
        ({"conversations": [GOOD[0], {"from": "observation", "value": "{}"}]}, "turn 2 is a tool"),
        (
            {"conversations": [GOOD[0], {"from": "gtp", "value": "b"}]},
            "turn 2 is from 'gtp' (did you mean 'gpt'?)",
        ),
        ({"conversations": [GOOD[0], {"role": "gpt"}]}, "turn 2 has no 'from'"),
        ({"conversations": [GOOD[0], {"from": "gpt"}]}, "value of turn 2 must be a string, not N"),
        ({"conversations": ["a"]}, "turn 1 must be an object, not str"),
        ({"conversations": [GOOD[1]]}, "turn 1 is 'assistant' where 'user' is expected"),
        ({"conversation": GOOD}, "no column 'conversations' (did you mean 'conversation'?)"),
    ],
)
def test_sharegpt_rows(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write(tmp_path, SHAREGPT, row)
    (found,) = reasons(read("llamafactory", tmp_path, Path()))
    assert found.startswith(reason)
    assert bool(found) is bool(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "i"}, "no column 'output'"),
        ({"instruction": "i", "output": 5}, "column 'output' must be a string, not int"),
        ({"instruction": "i", "output": ""}, "turn 2 (assistant) is empty"),
        ({"instruction": "i", "output": "o", "history": ["x"]}, "history 1 must be a prompt and"),
        ({"instruction": "i", "output": "o", "history": [["x", None]]}, "history 1 must be a str"),
        ({"instruction": "i", "output": "o", "system": 5}, "system must be a string, not int"),
    ],
)
def test_alpaca_rows(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    write(tmp_path, {"file_name": "x.json", "columns": {**columns, "system": "system"}}, row)
    (found,) = reasons(read("llamafactory", tmp_path, Path()))
    assert found.startswith(reason)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "it has no file_name"),
        ([], "it must be an object, not list"),
        ({"hf_hub_url": "a/b"}, "hf_hub_url is not supported: name it in path: hf://datasets/"),
        ({"ms_hub_url": "a/b"}, "ms_hub_url is not supported: download it"),
        ({"script_url": "x"}, "script_url is not supported: scripts are not run"),
        ({"file_name": "x.json", "ranking": True}, "ranking is not supported: preference data"),
        ({"file_name": "x.json", "num_samples": 5}, "num_samples is not supported: .*max_samples"),
        ({"file_name": "x.json", "subset": "x"}, "subset is not supported"),
        ({"file_name": "x.json", "split": "test"}, "split 'test': a file has only train"),
        ({"file_name": "x.json", "formating": "x"}, r"'formating' \(did you mean 'formatting'\?"),
        ({"file_name": "x.json", "formatting": "openai"}, "unknown formatting 'openai'"),
        ({"file_name": "x.json", "columns": {"chosen": "c"}}, "columns.chosen: preference data"),
        ({"file_name": "x.json", "columns": {"image": "c"}}, "columns.image .did you mean 'images"),
        ({"file_name": "x.json", "columns": {"images": 5}}, "columns.images must be a name"),
        ({"file_name": "x.json", "columns": []}, "columns must be an object, not list"),
        ({"file_name": "x.json", "tags": {}}, "tags belong to formatting: sharegpt"),
        (
            {"file_name": "x.json", "formatting": "sharegpt", "tags": {"rol_tag": "x"}},
            r"unknown key tags.rol_tag \(did you mean 'role_tag'\?\)",
        ),
        ({"file_name": "../x.json"}, "leaves the folder"),
        ({"file_name": "/etc/x.json"}, "leaves the folder"),
        ({"file_name": "s3://bucket/x.json"}, "leaves the folder"),
        ({"file_name": "link.json"}, "leaves"),
        ({"file_name": "gone.json"}, "not found: .*gone.json"),
        ({"file_name": "a.png"}, "no supported suffix"),
    ],
)
def test_entries_that_are_refused(entry: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "data", entry)
    (tmp_path / "outside.json").write_text("[]")
    (tmp_path / "data" / "link.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(DataError, match=message) as caught:
        read("llamafactory", tmp_path / "data", Path())
    assert "\n" not in caught.value.message


def test_the_entry_and_its_file_are_found_by_name(tmp_path: Path) -> None:
    entries = {name: {"file_name": "x.json"} for name in ("train", "other")}
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps(entries))
    for options, message in [
        ({}, "has 2 entries: name one in dataset: other, train"),
        ({"dataset": "tarin"}, r"has no entry 'tarin' \(did you mean 'train'\?\)"),
    ]:
        with pytest.raises(DataError, match=message):
            read("llamafactory", tmp_path, Path(), **options)
    for content, message in [("[]", "must hold an object"), ("{", "cannot be read: Expecting")]:
        info.write_text(content)
        with pytest.raises(DataError, match=rf"dataset_info\.json {message}"):
            read("llamafactory", tmp_path, Path())
    info.rename(tmp_path / "dataset_infos.json")
    with pytest.raises(DataError, match=r"did you mean 'dataset_infos\.json'"):
        read("llamafactory", tmp_path, Path())
