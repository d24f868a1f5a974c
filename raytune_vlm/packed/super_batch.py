"""The micro-batches of several slots as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.models.families import Family
from raytune_vlm.prepare.feed import Arrays

_ROWS = ("input_ids", "decoder_input_ids")


def num_rows(arrays: Arrays) -> int:
    """Rows of a micro-batch."""
    return len(_ids(arrays))


def length(arrays: Arrays) -> int:
    """Tokens of each row, padding included."""
    return int(_ids(arrays).shape[1])


def joined(parts: Sequence[Arrays], family: Family, *, pad_token_id: int) -> Arrays:
    """Micro-batches one after another, each array padded behind to the largest.

    A micro-batch without an array that the others have gets rows of zeros, as `collate_arrays`
    would give them, unless the array counts images and not rows.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: _joined(
            parts,
            name,
            _fill(name, pad_token_id),
            by_rows=family.media.get(name, "tokens") != "concatenate",
        )
        for name in names
    }


def _joined(parts: Sequence[Arrays], name: str, fill: int, *, by_rows: bool) -> np.ndarray:
    known = next(part[name] for part in parts if name in part)
    arrays = []
    for part in parts:
        if name in part:
            arrays.append(part[name])
        elif by_rows:
            arrays.append(np.zeros((num_rows(part), *[0] * (known.ndim - 1)), known.dtype))
    shape = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
    out = np.full((sum(map(len, arrays)), *shape), fill, dtype=known.dtype)
    begin = 0
    for array in arrays:
        out[(slice(begin, begin + len(array)), *map(slice, array.shape[1:]))] = array
        begin += len(array)
    return out


def _fill(name: str, pad_token_id: int) -> int:
    if name == "labels":
        return IGNORED
    return pad_token_id if name in _ROWS else 0


def _ids(arrays: Arrays) -> np.ndarray:
    return arrays["decoder_input_ids" if "decoder_input_ids" in arrays else "input_ids"]
