"""Encoded samples -> the arrays of one padded batch; without torch, as data tasks need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.models.families import Family

IGNORED = -100
"""The label of a token that carries no loss."""

ENCODER_IDS = "encoder_input_ids"
"""The tensor that holds the tokens of a text encoder, int32 `[length of the question]`."""

_ENCODER_MASK = "encoder_attention_mask"


def collate_arrays(
    samples: Sequence[Encoded],
    family: Family,
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
    pad_to: int = 0,
) -> dict[str, np.ndarray]:
    """A batch of exactly what the family's forward takes, plus `labels`; pixels still uint8.

    Parameters
    ----------
    pad_to
        Least length of the batch; 0 pads to the longest sample.

    Returns
    -------
    dict
        `input_ids`, `attention_mask`, `labels` int64 `[batch, longest]` (labels are not shifted and
        -100 outside the assistant's turns), token-aligned arrays `[batch, longest, ...]` padded
        with zero, media arrays batched as `Family.media` says. Of an encoder-decoder the first two
        are named `decoder_input_ids` and `decoder_attention_mask`, and those names are its text
        encoder's, padded on the right, where it has one.
    """
    length = max(pad_to, *(len(sample.input_ids) for sample in samples))

    def padded(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
        return _padded(arrays, fill, length, padding_side)

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
        layout = family.media.get(name, "tokens")
        if name == ENCODER_IDS:
            longest = max(map(len, arrays))
            batch[name] = _padded(arrays, pad_token_id, longest, "right")
            masks = [np.ones_like(array) for array in arrays]
            batch[_ENCODER_MASK] = _padded(masks, 0, longest, "right")
        elif layout == "concatenate":
            batch[name] = _widened(np.concatenate(same_size(arrays)))
        elif layout == "samples":
            batch[name] = _widened(_stacked(samples, name))
        else:
            blank = arrays[0][:0]
            batch[name] = padded([sample.tensors.get(name, blank) for sample in samples], 0)
    return _named(batch, family)


def _padded(
    arrays: Sequence[np.ndarray], fill: int, length: int, side: Literal["left", "right"]
) -> np.ndarray:
    """int64 `[batch, length, ...]`; dimensions after the tokens are as large as the largest."""
    shape = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
    out = np.full((len(arrays), length, *shape), fill, dtype=np.int64)
    for row, array in zip(out, arrays, strict=True):
        begin = 0 if side == "right" else length - len(array)
        row[(slice(begin, begin + len(array)), *map(slice, array.shape[1:]))] = array
    return out


def _named(batch: dict[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """The names that the family's forward has for the sequences."""
    if family.prompt not in ("encoder-decoder", "image-encoder"):
        return batch
    names = {
        "input_ids": "decoder_input_ids",
        "attention_mask": "decoder_attention_mask",
        ENCODER_IDS: "input_ids",
        _ENCODER_MASK: "attention_mask",
    }
    return {names.get(name, name): array for name, array in batch.items()}


def same_size(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays padded with zeros behind, so that only their first dimensions differ."""
    shape = np.max([array.shape[1:] for array in arrays], axis=0).astype(int).tolist()
    return [
        array
        if array.shape[1:] == tuple(shape)
        else np.pad(
            array,
            [(0, 0), *((0, size - own) for size, own in zip(shape, array.shape[1:], strict=True))],
        )
        for array in arrays
    ]


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
