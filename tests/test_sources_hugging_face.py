"""Folders that `Dataset.save_to_disk` wrote."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from test_sources import config_of, read, reasons

from raytune_vlm.errors import DataError
from raytune_vlm.records import Sample
from raytune_vlm.sources.hugging_face import split_of_file


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `DatasetDict` on disk, as the library itself writes it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")

    def made(first: int, count: int) -> Any:
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "b"}]
        columns = {
            "image": [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(first, first + count)],
            "text": [f"t{n}" for n in range(first, first + count)],
            "conversations": [turns] * count,
        }
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    parts = datasets.DatasetDict(train=made(0, 5), test=made(100, 2))
    parts.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
    return tmp_path / "saved"


def test_a_saved_dataset_is_a_path_like_any_other(saved: Path) -> None:
    found = read("image_text", "saved", saved.parent, dataset_split="train")
    assert [item.answer for item in found if isinstance(item, Sample)] == [
        f"t{n}" for n in range(5)
    ]
    assert found[0].origin == "saved/train/data-00000-of-00002.arrow:1"
    assert found == read("image_text", "saved/train", saved.parent)
    assert len(read("image_text", saved, Path(), dataset_split="test")) == 2
    talks = read("sharegpt", "saved/test", saved.parent, images_column="image")
    assert [len(item.images) for item in talks if isinstance(item, Sample)] == [1, 1]


def test_a_split_has_to_be_named_and_to_be_there(saved: Path) -> None:
    for split, message in [
        (None, "name one of its splits with dataset_split: test, train"),
        ("trian", r"has no split 'trian' \(did you mean 'train'\?\)"),
    ]:
        with pytest.raises(DataError, match=message):
            read("image_text", "saved", saved.parent, dataset_split=split)
    with pytest.raises(DataError, match="has no splits"):
        read("image_text", "saved/train", saved.parent, dataset_split="train")
    (saved / "train" / "data-00001-of-00002.arrow").rename(saved / "train" / "data-9.arrow")
    with pytest.raises(DataError, match=r"lists 'data-00001-of-00002\.arrow', which is not there"):
        read("image_text", "saved/train", saved.parent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", {"_data_files": [{"filename": "../x.arrow"}]}, "which is not there"),
        ("state.json", {"_data_files": []}, "lists no data files"),
        ("state.json", {"_indices_data_files": [{}]}, "save it once more"),
        ("state.json", [], "must hold an object, not list"),
        ("dataset_dict.json", {"splits": ["../.."]}, "dataset_split: none"),
        ("dataset_dict.json", {}, "dataset_split: none"),
    ],
)
def test_what_the_library_would_not_write(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read("image_text", ".", tmp_path)


def test_a_file_of_rows_may_be_called_state(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps([{"text": "t"}]))
    assert reasons(read("image_text", ".", tmp_path)) == ["no column 'image' (known: text)"]


def test_a_sequence_of_objects_may_be_stored_as_an_object_of_lists(tmp_path: Path) -> None:
    talks = [
        {"from": ["human", "gpt"], "value": ["a", "b"]},
        {"from": ["human"], "value": ["a", "b"]},
    ]
    pq.write_table(pa.table({"conversations": talks}), tmp_path / "x.parquet")
    found = reasons(read("sharegpt", "x.parquet", tmp_path))
    assert found == ["", "column 'conversations': its lists differ in length"]


def test_the_split_of_a_file_on_the_hub() -> None:
    root = "hf://datasets/a/b@main"
    for path, split in [
        (f"{root}/data/train-00000-of-00002.parquet", "train"),
        (f"{root}/data/train-00000-of-00002-0123456789abcdef.parquet", "train"),
        (f"{root}/default/test/0000.parquet", "test"),
        (f"{root}/default/partial-train/0012.parquet", "train"),
        (f"{root}/validation.parquet", "validation"),
    ]:
        assert split_of_file(path) == split


def test_a_revision_is_the_hubs() -> None:
    with pytest.raises(ValidationError, match="revision needs a path of the form hf://datasets"):
        config_of("image_text", "data/x.jsonl", revision="main")
