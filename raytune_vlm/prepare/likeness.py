"""What tells that two samples are alike although their bytes differ: pictures and words, hashed."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Hashes = NDArray[np.uint64]

_SIDE = 32
_WAVES = np.cos(np.pi * np.arange(1, 9)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
"""The first eight cosine waves after the constant one, [8, 32]."""

FLAT = 8
"""Grey values of a picture that span less than this say nothing."""

_PAIRS = 2_000_000
"""The most pairs of hashes that are compared at once (16 MB)."""


def picture_hash(image: Image.Image) -> int | None:
    """64 bits that stay about the same when a picture is scaled, compressed or brightened.

    pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions"): the
    picture in grey at 32 x 32 pixels, its 8 x 8 lowest frequencies of a cosine transform without
    the constant ones, a bit for each above their median. None for a picture of one colour.
    """
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.float64)
    if np.ptp(pixels) < FLAT:
        return None
    waves = (_WAVES @ pixels @ _WAVES.T).ravel()
    return int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), "big")


def words_id(question: str, answer: str) -> str:
    """A hash of the words, whatever their case, marks and blanks; empty where there are none."""
    both = [" ".join(re.findall(r"\w+", _plain(text))) for text in (question, answer)]
    if not any(both):
        return ""
    return hashlib.sha256("\x1f".join(both).encode("utf-8", "replace")).hexdigest()[:16]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def nearest(known: Hashes, asked: Hashes, most: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For each hash that is asked for the nearest known one, if it is near enough.

    Two hashes that differ in at most `most` bits agree in at least one of `most` + 1 groups of
    bits, so only those that share a group are compared (Manku, Jain and Sarma 2007, "Detecting
    near-duplicates for web crawling"). The bits of a group are spread over the hash: neighbours say
    the same of pages with white margins.

    Parameters
    ----------
    known, asked
        [N] and [M].
    most
        Bits that may differ.

    Returns
    -------
    places, distances
        [M] each: the place in `known` of the first of the nearest ones, or -1; and by how many
        bits it differs (undefined where there is none).
    """
    # Equal hashes once each: a picture that stands a thousand times is compared once.
    unique, first = np.unique(known, return_index=True)
    wanted, back = np.unique(asked, return_inverse=True)
    place = np.full(len(wanted), -1, dtype=np.intp)
    distance = np.full(len(wanted), most + 1, dtype=np.intp)
    for group in range(most + 1):
        mask = np.uint64(sum(1 << bit for bit in range(group, 64, most + 1)))
        for rows, candidates in _sharing(unique & mask, wanted & mask):
            apart = np.bitwise_count(unique[candidates] ^ wanted[rows]).astype(np.intp)
            better = np.flatnonzero(apart < distance[rows])
            # The nearest of a row comes last, and the last assignment counts.
            better = better[np.argsort(-apart[better], kind="stable")]
            nearer = apart[better] < distance[rows[better]]
            place[rows[better[nearer]]] = candidates[better[nearer]]
            distance[rows[better[nearer]]] = apart[better[nearer]]
    found = np.where(place >= 0, first[place] if len(first) else -1, -1)
    return found[back], distance[back]


def _sharing(known: Hashes, asked: Hashes) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """The pairs (place in `asked`, place in `known`) of equal values, in blocks of `_PAIRS`."""
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    start = np.searchsorted(ordered, asked, "left")
    count = np.searchsorted(ordered, asked, "right") - start
    ends = np.cumsum(count)
    row = 0
    while row < len(asked):
        before = int(ends[row - 1]) if row else 0
        last = max(int(np.searchsorted(ends, before + _PAIRS, "right")), row + 1)
        sizes = count[row:last]
        rows = np.repeat(np.arange(row, last), sizes)
        inside = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if len(rows):
            yield rows, order[np.repeat(start[row:last], sizes) + inside]
        row = last
