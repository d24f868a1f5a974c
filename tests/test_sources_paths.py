"""Which files a source, and the rows in it, may read."""

import io
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import lines, png, read, reasons

from raytune_vlm.errors import DataError


def test_folders_globs_and_their_errors(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        lines(tmp_path / name, {"image": "x", "text": "y"})
    (tmp_path / "notes.txt").write_text("x")
    assert [item.origin for item in read("image_text", ".", tmp_path)] == ["a.jsonl:1", "b.jsonl:1"]
    assert len(read("image_text", "**/*.jsonl", tmp_path)) == 3
    assert len(read("image_text", str(tmp_path / "*.jsonl"), Path())) == 2
    for path, message in [
        ("*.jsonx", "matches nothing"),
        ("nothere/*.jsonl", "no folder"),
        ("*.txt", "no file with a supported suffix"),
        ("notes.txt", "no supported suffix"),
    ]:
        with pytest.raises(DataError, match=message):
            read("image_text", path, tmp_path)
    with pytest.raises(DataError, match="leaves"):
        read("image_text", "../*.jsonl", tmp_path / "deep")
    with pytest.raises(DataError, match="not found"):
        read("image_text", "a.jsonl", tmp_path / "nothere")


def test_links_inside_a_folder_do_not_lead_out(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "x.jsonl").symlink_to(lines(outside / "x.jsonl", {"image": "x", "text": "y"}))
    for path, root in ((".", inside), (str(inside), Path()), (str(inside / "*"), Path())):
        with pytest.raises(DataError, match="leaves"):
            read("image_text", path, root)
    # A file that a person names by its absolute path may be a link.
    assert len(read("image_text", inside / "x.jsonl", Path())) == 1


def test_images_stay_in_the_folder_of_the_source_or_the_root(tmp_path: Path) -> None:
    root, data = tmp_path / "root", tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    data.mkdir()
    for file in (root / "pictures/a.png", data / "b.png", tmp_path / "secret.png"):
        file.write_bytes(png())
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["pictures/a.png", "b.png", str(data / "b.png"), "../secret.png"]
    names += [
        str(tmp_path / "secret.png"),
        "link.png",
        "http://host/x.png",
        ".",
        "a\0b",
        "x" * 5000,
    ]
    file = lines(data / "x.jsonl", *({"image": name, "text": "t"} for name in names))
    found = reasons(read("image_text", file, root))
    assert found[:3] == ["", "", ""]
    assert all(reason.startswith("image is outside") for reason in found[3:6])
    assert found[6].startswith("image is a URL")
    assert all(found[7:])


def test_remote_sources_need_permission_and_keep_their_folder() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/set/a.png", png())
    system.pipe("/secret.png", png())
    names = ("a.png", "../secret.png", "gone.png")
    text = "\n".join(json.dumps({"image": name, "text": "t"}) for name in names)
    system.pipe("/set/x.jsonl", text.encode())
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [png(3)], "text": ["p"]}), table)
    system.pipe("/set/y.parquet", table.getvalue())
    try:
        with pytest.raises(DataError, match=r"data\.allow_network"):
            read("image_text", "memory://set/x.jsonl", Path())
        with pytest.raises(DataError, match="nothing found"):
            read("image_text", "memory://set/*.json", Path(), network=True)
        with pytest.raises(DataError, match="unknown scheme"):
            read("image_text", "file:///etc/x.jsonl", Path(), network=True)
        for path in ("memory://set", "memory://set/*"):
            found = reasons(read("image_text", path, Path(), network=True))
            assert found[0] == found[3] == ""
            assert "outside" in found[1]
            assert "not found" in found[2]
    finally:
        system.rm("/set", recursive=True)
        system.rm("/secret.png")
