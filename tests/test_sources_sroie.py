"""SROIE: which lines are kept, how they are cut out, what is quarantined."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_sources import LIMITS, MODELS, box, make_sroie, read

from raytune_vlm.errors import DataError
from raytune_vlm.images import decode
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import SOURCES
from raytune_vlm.sources.base import RowError
from raytune_vlm.sources.sroie import crop_box


def test_sroie_keeps_amounts_and_dates(tmp_path: Path) -> None:
    kept = [
        "9.00",
        "-0.03",
        "RM1,234.50",
        "$9.90 SR",
        ".50",
        "25/12/2018 8:13:39 PM",
        "05 MAR 2018",
        "2018-03-05",
        "12-03-18",
    ]
    left = ["9", "TOTAL: 9.00", "18:24:10", "789417-W", "1.234", "6%", "12-03/18", "CASH"]
    root, _, _ = make_sroie(tmp_path, *(box(10, 10, 50, 20, text) for text in kept + left))
    found = read("sroie", root, tmp_path)
    assert [item.answer for item in found if isinstance(item, Sample)] == kept
    assert {item.group_id for item in found if isinstance(item, Sample)} == {"410"}
    assert len(read("sroie", root, tmp_path, max_characters=5)) == 3
    everything = read("sroie", root, tmp_path, keep="all")
    assert len(everything) == len(kept + left)


def test_sroie_crops_with_a_margin_and_clips(tmp_path: Path) -> None:
    root, _, _ = make_sroie(tmp_path, box(10, 10, 50, 20, "9.00"), box(-5, 50, 20, 90, "8.00"))
    first, second = read("sroie", root, tmp_path, margin=0.5)
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    crop = decode(first.images[0], LIMITS)
    assert crop.size == (50, 20)
    assert crop.getpixel((25, 10))[0] < 60
    assert decode(second.images[0], LIMITS).size == (25, 15)


def test_sroie_flaws_are_quarantined_line_by_line(tmp_path: Path) -> None:
    root, _, _ = make_sroie(
        tmp_path, box(10, 10, 10, 20, "9.00"), "1,2,3,oops", box(10, 10, 50, 20, "7.00")
    )
    file = root / "box" / "410.csv"
    line = box(10, 10, 50, 20, "").encode()
    file.write_bytes(
        b"\xef\xbb\xbf" + file.read_bytes() + b"\r\n\r\n" + line + b"\xa35.00\n" + line + b"caf\xe9"
    )
    make_sroie(tmp_path, name="411")
    (root / "img" / "411.jpg").write_bytes(b"broken")
    make_sroie(tmp_path, name="412")
    (root / "img" / "412.jpg").unlink()
    make_sroie(tmp_path, name="413")
    (root / "box" / "413.csv").unlink()
    found = read("sroie", root, tmp_path)
    by_origin = {item.origin: item for item in found}
    assert len(by_origin) == len(found)
    expected: dict[str, Callable[[str], bool]] = {
        "box/410.csv:1": lambda text: text.startswith("degenerate box"),
        "box/410.csv:2": lambda text: text.startswith("malformed box line"),
        "box/410.csv:5": lambda text: text == "the transcript is not UTF-8",
        "box/411.csv:1": lambda text: text.startswith("not an image"),
        "box/412.csv:3": lambda text: text.startswith("image not found"),
        "img/413.jpg": lambda text: text == "the scan has no box file",
    }
    for origin, says in expected.items():
        item = by_origin[f"receipts/{origin}"]
        assert isinstance(item, Quarantined)
        assert says(item.reason), item.reason
    assert isinstance(by_origin["receipts/box/410.csv:3"], Sample)
    assert len(found) == 4 + 3 + 3 + 1


def test_sroie_folder_errors(tmp_path: Path) -> None:
    root, _, _ = make_sroie(tmp_path)
    (root / "box").rename(root / "boxes")
    with pytest.raises(DataError, match=r"no folder 'box' in .*did you mean 'boxes'"):
        read("sroie", root, tmp_path)
    for number in range(20):
        make_sroie(tmp_path / "many", name=f"{number:03d}")
    config = MODELS["sroie"](type="sroie", path="many/receipts")
    shards = SOURCES["sroie"].list_shards(config, tmp_path, False)
    assert [len(shard.members) for shard in shards] == [8, 8, 4]


def test_degenerate_boxes() -> None:
    assert crop_box((2, 2, 8, 6), (10, 10), 0.0) == (2, 2, 8, 6)
    for bad in ((5, 5, 5, 9), (20, 0, 30, 5), (-9, 0, 1, 5), (3, 9, 8, 30)):
        with pytest.raises(RowError, match="degenerate"):
            crop_box(bad, (10, 10), 1.0)
