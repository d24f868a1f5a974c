"""Encoded samples -> the arrays of one padded batch; without torch, as data tasks need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.models.families import Family

IGNORED = -100
"""The label of a token that carries no loss."""


def collate_arrays(
    samples: Sequence[Encoded],
    family: Family,
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
) -> dict[str, np.ndarray]:
    """A batch of exactly what the family's forward takes, plus `labels`; pixels still uint8.

    Returns
    -------
    dict
        `input_ids`, `attention_mask`, `labels` int64 `[batch, longest]` (labels are not shifted and
        -100 outside the assistant's turns), token-aligned arrays `[batch, longest]` padded with
        zero, media arrays batched as `Family.media` says.
    """
    length = max(len(sample.input_ids) for sample in samples)

    def padded(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
        out = np.full((len(arrays), length), fill, dtype=np.int64)
        for row, array in zip(out, arrays, strict=True):
            if padding_side == "right":
                row[: len(array)] = array
            else:
                row[length - len(array) :] = array
        return out

    labels = []
    for sample in samples:
        row = np.full(len(sample.input_ids), IGNORED, dtype=np.int64)
        for start, end in sample.spans:
            row[start:end] = sample.input_ids[start:end]
        labels.append(row)
    batch = {
        "input_ids": padded([sample.input_ids for sample in samples], pad_token_id),
        "attention_mask": padded([np.ones_like(sample.input_ids) for sample in samples], 0),
        "labels": padded(labels, IGNORED),
    }
    for name in sorted({name for sample in samples for name in sample.tensors}):
        arrays = [sample.tensors[name] for sample in samples if name in sample.tensors]
        layout = family.media.get(name)
        if layout is None:
            whole = [
                sample.tensors.get(name, np.zeros_like(sample.input_ids)) for sample in samples
            ]
            batch[name] = padded(whole, 0)
        elif layout == "concatenate":
            batch[name] = _widened(np.concatenate(arrays))
        else:
            batch[name] = _widened(_stacked(samples, name))
    return batch


def _stacked(samples: Sequence[Encoded], name: str) -> np.ndarray:
    """`[batch, most tiles, ...]` with zeros where a sample has fewer tiles or smaller ones."""
    known = next(sample.tensors[name] for sample in samples if name in sample.tensors)
    empty = np.zeros((0, *known.shape[1:]), dtype=known.dtype)
    arrays = [sample.tensors.get(name, empty) for sample in samples]
    shape = tuple(max(array.shape[axis] for array in arrays) for axis in range(known.ndim))
    out = np.zeros((len(arrays), *shape), dtype=known.dtype)
    for row, array in zip(out, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return out


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64) if array.dtype in (np.int8, np.int32) else array
