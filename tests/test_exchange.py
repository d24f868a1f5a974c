"""`raytune-vlm data export`: what is written for other trainers is read back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from made import picture, turn
from test_inspection import run, write_rows

from raytune_vlm.cli_data import EXPORT_FORMATS
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.errors import RaytuneVlmError
from raytune_vlm.exchange.formats import FORMATS
from raytune_vlm.inspection.rows import Checked, read_rows
from raytune_vlm.records import SPLITS, Sample, Split

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One row of each kind that every format can say; the images are in three encodings."""
    folder.mkdir()
    for number, suffix in enumerate(("png", "jpeg", "bmp", "png")):
        picture(number).save(folder / f"{number}.{suffix}")
    several = turn("user", " then\nwhat? ", images=2)
    several["content"].append({"type": "image"})
    return [
        {
            "messages": [turn("user", "read", 1), turn("assistant", "é漢🙂  \n")],
            "images": ["0.png"],
        },
        {
            "messages": [
                turn("system", "be <brief>"),
                several,
                turn("assistant", "this"),
                turn("user", "sure?"),
                turn("assistant", "  yes\u2028"),
            ],
            "images": ["1.jpeg", "2.bmp", "0.png"],
            "group_id": "mine",
        },
        {"messages": [turn("user", "no picture"), turn("assistant", "none")], "group_id": 7},
        *(
            {
                "messages": [turn("user", f"page {number}", 1), turn("assistant", "a")],
                "images": ["3.png"],
                "group_id": f"group {number}",
            }
            for number in range(12)
        ),
    ]


def write_experiment(folder: Path, *sources: dict[str, Any], **data: Any) -> Path:
    plain = {"name": "x", "data": {"root": str(folder), "sources": list(sources), **data}}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(plain))
    return file


def samples(file: Path) -> dict[str, list[Sample]]:
    """Split -> samples; those of `auto` under that name."""
    found: dict[str, list[Sample]] = {}
    for row in read_rows(load_experiment(file), None, lambda done, total: None):
        assert isinstance(row, Checked), row
        found.setdefault(row.split, []).append(row.sample)
    return found


def said(sample: Sample) -> tuple[Any, ...]:
    """All of a sample but its place."""
    return sample.sample_id, sample.group_id, sample.messages, sample.images, sample.tools


def read_back(form: str, output: Path, splits: list[Split]) -> dict[str, list[Sample]]:
    """The samples of an export, through the keys that its format names."""
    sources = []
    for split in splits:
        source = {key: value.format(split=split) for key, value in FORMATS[form].source.items()}
        sources.append({**source, "split": split})
    return samples(write_experiment(output, *sources))


def refused(*arguments: object) -> str:
    """What `raytune-vlm data ...` says when it refuses."""
    with pytest.raises(RaytuneVlmError) as error:
        run(*arguments)
    return error.value.message


def test_the_command_knows_every_format():
    assert tuple(FORMATS) == EXPORT_FORMATS


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_exported_is_read_back_as_it_was(form, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    rows = rows_of(data)
    write_rows(data / "a.jsonl", rows)
    settings = {"split": {"select": 0.3, "report": 0.3}}
    experiment = write_experiment(data, {"type": "messages", "path": "a.jsonl"}, **settings)
    before = {sample.sample_id: said(sample) for sample in samples(experiment)["auto"]}

    printed = run("export", experiment, "--format", form, "--output", output).stdout
    splits = [split for split in SPLITS if f"{split}: " in printed]
    assert splits == list(SPLITS)
    after = read_back(form, output, splits)
    assert {name: said(s) for split in after.values() for s in split for name in [s.sample_id]} == (
        before
    )
    assert sum(map(len, after.values())) == len(before)
    for split, found in after.items():
        assert f"{split}: {len(found)} samples" in printed
    groups = [{sample.group_id for sample in found} for found in after.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_tools_and_words_of_placeholders_need_the_format_that_has_them(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    talk = [
        turn("user", "what is <video>?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        turn("tool", "3"),
        turn("assistant", "three"),
    ]
    file = write_rows(data / "a.jsonl", [{"messages": talk, "tools": [TOOL]}])
    experiment = write_experiment(data, {"type": "messages", "path": "a.jsonl", "split": "train"})
    for form in set(FORMATS) - {"trl"}:
        output = tmp_path / form
        message = refused("export", experiment, "--format", form, "--output", output)
        assert "a.jsonl:1: tool calls" in message and "--format trl" in message
        assert not output.exists() and not list(tmp_path.glob(".*"))
    output = tmp_path / "trl"
    run("export", experiment, "--format", "trl", "--output", output)
    after = read_back("trl", output, ["train"])["train"]
    assert list(map(said, after)) == list(map(said, samples(experiment)["train"]))

    write_rows(file, [{"messages": [talk[0], talk[3]]}])
    arguments = ("export", experiment, "--output", tmp_path / "out", "--format")
    assert "'<video>'" in refused(*arguments, "llamafactory")
    assert run(*arguments, "trl").stdout


def test_what_is_left_out_or_changed_is_told(tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}, turn("assistant", "c")]}
    (data / "broken.png").write_bytes(b"no picture")
    bad = {"messages": [turn("user", "q", 1), turn("assistant", "a")], "images": ["broken.png"]}
    write_rows(data / "train.jsonl", [row, row])
    write_rows(data / "select.jsonl", [row, row, bad])
    sources = [
        {"type": "messages", "path": "train.jsonl", "split": "train", "weight": 2.0},
        {"type": "messages", "path": "select.jsonl", "split": "select"},
    ]
    experiment = write_experiment(data, *sources, deduplicate=True)
    command = ("export", experiment, "--format", "ms_swift", "--output", output)
    assert "2 of 5 samples cannot be used" in refused(*command)
    assert not output.exists()

    printed = run(*command, "data.max_bad_fraction=0.5").stdout
    assert "left out: select.jsonl:2: exact duplicate of select.jsonl:1" in printed
    assert "left out: select.jsonl:3: not an image" in printed
    assert "left out: 1 copies in train" in printed and "the weights of the sources" in printed
    assert "2 samples: neighbouring texts" in printed
    assert "train: 1 samples" in printed and "select: 1 samples" in printed
    assert not (output / "report.jsonl").exists()
    asked = read_back("ms_swift", output, ["train"])["train"][0].messages[0]
    assert asked["content"] == [{"type": "text", "text": "ab"}]
    assert "there is something already" in refused(*command)


def test_pictures_are_the_same_bytes_and_lie_where_the_trainers_look(tmp_path):
    data = tmp_path / "data"
    rows = rows_of(data)[:2]
    experiment = write_experiment(data, {"type": "messages", "path": "a.jsonl", "split": "train"})
    write_rows(data / "a.jsonl", rows)
    given = {(data / name).read_bytes() for name in ("0.png", "1.jpeg", "2.bmp")}
    for form in FORMATS:
        output = tmp_path / form
        run("export", experiment, "--format", form, "--output", output)
        file = output / FORMATS[form].rows_file.format(split="train")
        first, second = map(json.loads, file.read_text(encoding="utf-8").split("\n")[:2])
        names = second.get("images") or second["images_file_names"]
        assert (file.parent / names[0]).suffix == ".jpeg"
        assert {(file.parent / name).read_bytes() for name in names} == given
        assert (first.get("images") or first["images_file_names"]) == [names[2]]
    meta = json.loads((tmp_path / "automodel" / "meta.json").read_text())
    assert meta["train"]["media_dir"] == str(tmp_path / "automodel")
