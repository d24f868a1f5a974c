"""Alike samples of two splits: hashes of pictures and words, and the index that finds them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from raytune_vlm.prepare.likeness import nearest, picture_hash, words_id
from raytune_vlm.prepare.overlap import COLUMNS, count_overlaps, find_overlaps, write_overlaps
from raytune_vlm.records import SweepFolder


def page(seed, size=(300, 400)):
    """A page of made-up lines on white."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for line in range(12):
        start, length = generator.integers(10, 80), generator.integers(20, 200)
        draw.rectangle((start, 20 + 30 * line, start + length, 32 + 30 * line), fill=(40, 40, 60))
    return image


def distance(first, second):
    return (picture_hash(first) ^ picture_hash(second)).bit_count()


def test_copies_of_a_picture_are_near_and_others_are_far():
    for seed in range(20):
        image = page(seed)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
        assert distance(image, Image.open(buffer).convert("RGB")) <= 2
        assert distance(image, image.resize((210, 280), Image.Resampling.LANCZOS)) <= 4
        assert distance(image, image.point(lambda value: value * 0.8)) <= 2
        assert distance(image, page(seed + 100)) > 6
    assert picture_hash(Image.new("RGB", (64, 64), (255, 255, 255))) is None


def test_words_are_the_same_whatever_their_case_and_marks():
    assert words_id("What is the TOTAL?", "12.50") == words_id("what is the total", " 12 50 ")
    assert words_id("a", "b c") != words_id("a b", "c")
    assert words_id("?", " - ") == ""


@pytest.mark.parametrize("most", [0, 2, 5])
def test_nearest_is_what_comparing_all_pairs_finds(most):
    generator = np.random.default_rng(most)
    known = generator.integers(0, 2**63, 400, dtype=np.uint64)
    known[50:60] = known[40]
    asked = np.concatenate([known[generator.integers(0, 400, 150)], known[:1] ^ np.uint64(0)])
    for row in range(len(asked)):
        for bit in generator.choice(64, generator.integers(0, 8), replace=False):
            asked[row] ^= np.uint64(1 << int(bit))
    places, distances = nearest(known, asked, most)
    apart = np.bitwise_count(known[None] ^ asked[:, None])
    near = apart.min(axis=1) <= most
    assert near.any() and (~near).any()
    assert ((places >= 0) == near).all()
    assert (distances[near] == apart.min(axis=1)[near]).all()
    assert (places[near] == apart.argmin(axis=1)[near]).all()
    empty = np.array([], dtype=np.uint64)
    assert (nearest(empty, asked, most)[0] == -1).all() and len(nearest(known, empty, most)[0]) == 0


def index_of(*rows):
    names = ("split", *COLUMNS)
    filled = [
        (split, f"s{n}", group, images, hashes, words, f"file:{n}")
        for n, (split, group, images, hashes, words) in enumerate(rows)
    ]
    columns = dict(zip(names, map(list, zip(*filled, strict=True)), strict=True))
    hashes = pa.array(columns.pop("picture_hashes"), pa.list_(pa.uint64()))
    return pa.table({**columns, "picture_hashes": hashes})


def test_each_kind_is_found_listed_and_counted(tmp_path):
    index = index_of(
        ("train", "g0", "i0", [0], "w0"),
        ("train", "g1", "i1", [0xFFFF], "w1"),
        ("train", "g2", "", [], "w2"),
        ("report", "g1", "i7", [0xFFFF << 40], "w7"),  # the same document
        ("report", "g8", "i1", [0xFFFF], "w8"),  # the same file
        ("report", "g9", "i9", [0x3], "w9"),  # nearly the same picture
        ("report", "g10", "i10", [0xFF << 50], "w1"),  # the same words, another picture
        ("report", "g11", "", [], "w2"),  # the same words, no picture
        ("report", "g12", "i12", [0xF0F << 20], "w12"),
        ("select", "g12", "i13", [], ""),
    )
    found = find_overlaps(index, 2)
    assert [(e.with_split, e.split, e.sample_id, e.kind, e.other_sample_id) for e in found] == [
        ("train", "report", "s3", "group", "s1"),
        ("train", "report", "s4", "image", "s1"),
        ("train", "report", "s5", "near_image", "s0"),
        ("train", "report", "s6", "text", "s1"),
        ("train", "report", "s7", "text", "s2"),
        ("select", "report", "s8", "group", "s9"),
    ]
    assert [entry.is_counted for entry in found] == [True, True, True, False, True, True]
    assert found[2].distance == 2 and (found[2].origin, found[2].other_origin) == (
        "file:5",
        "file:0",
    )
    pairs, kinds = count_overlaps(found)
    assert pairs == {"train/report": 4, "select/report": 1}
    assert kinds["train/report"] == {"group": 1, "image": 1, "near_image": 1, "text": 1}
    assert [e.kind for e in find_overlaps(index, None)].count("near_image") == 0
    folder = SweepFolder(tmp_path)
    write_overlaps(folder.overlap_file, found)
    assert folder.overlapping("report") == ["s3", "s4", "s5", "s7"]
    assert folder.overlapping("select") == []
    assert len(json.loads(folder.overlap_file.read_text().splitlines()[0])) == 9


def test_many_pictures_are_compared_in_seconds():
    """100,000 by 10,000 as pages are: half of them share a white margin, which is half the bits."""
    generator = np.random.default_rng(0)
    known = generator.integers(0, 2**63, 100_000, dtype=np.uint64)
    known[::2] &= np.uint64(0xFFFFFFFF)
    asked = known[:10_000].copy()
    asked[:5_000] ^= np.uint64(0b101)
    places, distances = nearest(known, asked, 2)
    assert (places[5_000:] == np.arange(5_000, 10_000)).all()
    assert (distances[:5_000] <= 2).all()
