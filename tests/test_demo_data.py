"""The demo's renderers and data set: seeded, complete, and importable without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from raytune_vlm.demo import lines, receipts
from raytune_vlm.demo.data import PROMPT, SETTINGS_FILE, write_demo_data
from raytune_vlm.errors import DataError
from raytune_vlm.images import on_canvas
from raytune_vlm.json_tokens import json2token, token2json

SIZES = {"num_train": 7, "num_select": 3, "num_report": 4}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo_data(folder, **SIZES)
    return folder


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_bytes(dataset: Path, tmp_path: Path) -> None:
    write_demo_data(tmp_path / "again", **SIZES)
    assert files_of(tmp_path / "again") == files_of(dataset)
    write_demo_data(tmp_path / "other", seed=1, **SIZES)
    assert files_of(tmp_path / "other") != files_of(dataset)


def test_report_does_not_depend_on_the_size_of_train(dataset: Path, tmp_path: Path) -> None:
    write_demo_data(tmp_path / "larger", **{**SIZES, "num_train": 12})
    assert read_rows(tmp_path / "larger" / "report.jsonl") == read_rows(dataset / "report.jsonl")


def test_splits_have_their_sizes_and_share_no_receipt(dataset: Path) -> None:
    answers: list[str] = []
    for split, count in (("select", 3), ("report", 4)):
        rows = read_rows(dataset / f"{split}.jsonl")
        assert len(rows) == count
        for row in rows:
            question, answer = row["messages"]
            assert [part["type"] for part in question["content"]] == ["image", "text"]
            assert question["content"][1]["text"] == PROMPT
            with Image.open(dataset / row["images"][0]) as image:
                assert image.width == lines.WIDTH
            answers.append(answer["content"][0]["text"])
    shards = sorted(dataset.glob("train-*.parquet"))
    assert len(shards) == 3
    train = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert len(train) == 7
    for row in train:
        assert row["images"][0]["bytes"].startswith(b"\x89PNG")
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        answers.append(row["messages"][1]["content"][0]["text"])
    assert len(set(answers)) == len(answers)
    for answer in answers:
        truth = token2json(answer)
        assert json2token(truth) == answer
        assert set(truth) == {"menu", "total"}
        assert {tuple(item) for item in truth["menu"]} == {("nm", "cnt", "price")}


def test_the_broken_samples_are_broken(dataset: Path) -> None:
    truncated, missing, empty = read_rows(dataset / "train-broken.jsonl")
    broken = io.BytesIO((dataset / truncated["images"][0]).read_bytes())
    with pytest.raises((OSError, UnidentifiedImageError, SyntaxError)):
        Image.open(broken).load()
    parts = [part["type"] for part in missing["messages"][0]["content"]]
    assert parts.count("image") == 2
    assert len(missing["images"]) == 1
    assert empty["messages"][1]["content"][0]["text"] == ""


def test_a_second_call_changes_nothing_and_other_settings_are_refused(dataset: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    write_demo_data(dataset, **SIZES)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before
    assert sorted(path.name for path in dataset.parent.iterdir()) == ["data"]
    with pytest.raises(DataError, match="not the demo data set"):
        write_demo_data(dataset, seed=5, **SIZES)


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("raytune_vlm.demo.data._write_broken", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo_data(tmp_path / "data", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(DataError):
        write_demo_data(tmp_path, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert not (tmp_path / SETTINGS_FILE).exists()


@pytest.mark.parametrize("render", [receipts.render_kind_a, receipts.render_kind_b])
def test_receipts_are_seeded_and_add_up(render) -> None:
    for seed in range(8):
        glyphs: list[lines.Glyph] = []
        image, truth = render(np.random.default_rng(seed), glyphs=glyphs)
        again, same = render(np.random.default_rng(seed))
        assert truth == same
        assert image.tobytes() == again.tobytes()
        items = truth.get("items") or truth["menu"]
        prices = [float(item.get("cost") or item["price"]) for item in items]
        total = truth.get("sum") or truth["total"]["total_price"]
        assert sum(prices) == pytest.approx(float(total))
        text = "".join(glyph.character for glyph in glyphs)
        for item in items:
            assert all(str(value) in text for value in item.values())
        for glyph in glyphs:
            assert 0 <= glyph.left < glyph.right <= image.width + 2
            assert 0 <= (glyph.top + glyph.bottom) / 2 <= image.height


def test_the_two_kinds_share_no_name_and_no_key() -> None:
    assert not set(receipts.NAMES_A) & set(receipts.NAMES_B)
    rng = np.random.default_rng(0)
    _, first = receipts.render_kind_a(rng)
    _, second = receipts.render_kind_b(rng)
    assert not set(first) & set(second)


def test_lines_fit_and_stay_in_the_alphabet() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = lines.random_line(rng)
        assert 1 <= len(text) <= lines.MAX_CHARACTERS
        assert text == " ".join(text.split())
        assert set(text) <= set(lines.ALPHABET)
        glyphs: list[lines.Glyph] = []
        image = lines.render_line(text, rng, glyphs=glyphs)
        assert "".join(glyph.character for glyph in glyphs) == text.replace(" ", "")
        assert glyphs[-1].right <= image.width + 2


@pytest.mark.parametrize(("width", "height"), [(40, 20), (300, 25), (12, 60)])
def test_a_crop_is_centred_on_ground_of_its_own_shade(width: int, height: int) -> None:
    crop = Image.new("L", (width, height), 200)
    crop.paste(30, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    pixels = np.asarray(on_canvas(crop, 192, 144).convert("L")).astype(int)
    assert pixels.shape == (144, 192)
    assert abs(pixels[0, 0] - 200) <= 2
    dark_rows, dark_columns = np.nonzero(pixels < 100)
    assert abs(dark_rows.mean() - pixels.shape[0] / 2) < 5
    assert abs(dark_columns.mean() - pixels.shape[1] / 2) < 5


def test_making_the_data_needs_no_torch() -> None:
    code = (
        "import sys, raytune_vlm.demo.data; "
        "print([m for m in ('torch', 'ray', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
