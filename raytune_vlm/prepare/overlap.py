"""Samples of one split that are much like some of another: they make scores look better.

Four kinds of likeness, each looked up in an index, none by comparing all pairs:

- `group`: the same document or image family;
- `image`: the same files;
- `near_image`: a picture that is nearly one of the other split's (`likeness.picture_hash`);
- `text`: the same question and answer, whatever their case and marks. With other pictures that is
  no overlap ("what colour is it?", "red"): it is listed, but does not count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_vlm.prepare.likeness import nearest
from raytune_vlm.records import SPLITS, Overlap

Kind = Literal["group", "image", "near_image", "text"]

COLUMNS = ("sample_id", "group_id", "images_id", "picture_hashes", "words_id", "origin")


def find_overlaps(index: pa.Table, max_distance: int | None) -> list[Overlap]:
    """Every sample with a like one in another split: one entry a kind, with the first like it.

    Parameters
    ----------
    index
        Rows of `store.INDEX_SCHEMA`.
    max_distance
        Bits by which the hashes of near images may differ; None: only equal files count.
    """
    named = index.select(list(COLUMNS))
    parts = {name: named.filter(pc.equal(index["split"], name)) for name in SPLITS}
    found: list[Overlap] = []
    for place, first in enumerate(SPLITS):
        for second in SPLITS[place + 1 :]:
            found += _between(first, parts[first], second, parts[second], max_distance)
    return found


def _between(
    first: str, known: pa.Table, second: str, asked: pa.Table, max_distance: int | None
) -> list[Overlap]:
    """The samples of `asked` (split `second`) that are like one of `known`."""
    same: dict[Kind, dict[int, int]] = {
        "group": _equal(known["group_id"], asked["group_id"]),
        "image": _equal(known["images_id"], asked["images_id"]),
        "text": _equal(known["words_id"], asked["words_id"]),
    }
    near = _near(known, asked, max_distance) if max_distance is not None else {}
    near = {row: pair for row, pair in near.items() if row not in same["image"]}
    has_image = np.asarray(pc.not_equal(asked["images_id"], ""))
    pictures = same["image"].keys() | near.keys()
    found: list[tuple[Kind, int, int, int | None, bool]] = []
    for kind, pairs in same.items():
        for row, other in pairs.items():
            counts = kind != "text" or not has_image[row] or row in pictures
            found.append((kind, row, other, None, bool(counts)))
    found += [("near_image", row, other, bits, True) for row, (other, bits) in near.items()]
    found.sort(key=lambda entry: (entry[1], entry[0]))
    return [
        Overlap(
            split=second,
            with_split=first,
            kind=kind,
            sample_id=_cell(asked, "sample_id", row),
            origin=_cell(asked, "origin", row),
            other_sample_id=_cell(known, "sample_id", other),
            other_origin=_cell(known, "origin", other),
            distance=bits,
            is_counted=counts,
        )
        for kind, row, other, bits, counts in found
    ]


def _cell(table: pa.Table, column: str, row: int) -> str:
    return str(table[column][row].as_py())


def _equal(known: pa.ChunkedArray, asked: pa.ChunkedArray) -> dict[int, int]:
    """Row of `asked` -> the first row of `known` with the same value; empty values are none."""
    places = pc.index_in(asked, value_set=known.combine_chunks())
    rows = np.flatnonzero(np.asarray(pc.and_(pc.is_valid(places), pc.not_equal(asked, ""))))
    return {int(row): int(places[int(row)].as_py()) for row in rows}


def _near(known: pa.Table, asked: pa.Table, max_distance: int) -> dict[int, tuple[int, int]]:
    """Row of `asked` -> (row of `known`, bits) of the nearest picture of any of its own."""
    own, theirs = _hashes(asked), _hashes(known)
    places, distances = nearest(theirs[1], own[1], max_distance)
    found: dict[int, tuple[int, int]] = {}
    for hit in np.flatnonzero(places >= 0):
        row, bits = int(own[0][hit]), int(distances[hit])
        if row not in found or bits < found[row][1]:
            found[row] = int(theirs[0][places[hit]]), bits
    return found


def _hashes(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The row and the hash of every picture."""
    lists = table["picture_hashes"].combine_chunks()
    return np.asarray(pc.list_parent_indices(lists)), np.asarray(pc.list_flatten(lists))


def count_overlaps(found: Sequence[Overlap]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Samples that overlap, by pair of splits (`"train/report"`), and the same by kind.

    Pairs and kinds without any are left out; a sample that is only listed is in none.
    """
    counted = [entry for entry in found if entry.is_counted]
    pairs = Counter(
        pair for pair, _ in {(f"{e.with_split}/{e.split}", e.sample_id) for e in counted}
    )
    kinds: dict[str, dict[str, int]] = {}
    for entry in counted:
        pair = kinds.setdefault(f"{entry.with_split}/{entry.split}", {})
        pair[entry.kind] = pair.get(entry.kind, 0) + 1
    return {pair: pairs[pair] for pair in kinds}, kinds


def write_overlaps(file: Path, found: Sequence[Overlap]) -> None:
    """`overlap.jsonl`: one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in found]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
