"""Encoded samples -> one padded batch; uint8 pixels -> what the vision tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from raytune_vlm.collate.encode import Encoded
from raytune_vlm.models.families import Family

IGNORED = -100
"""The label of a token that carries no loss."""


def collate(
    samples: Sequence[Encoded],
    family: Family,
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
) -> dict[str, torch.Tensor]:
    """A batch of exactly what the family's forward takes, plus `labels`; pixels still uint8.

    Returns
    -------
    dict
        `input_ids`, `attention_mask`, `labels` int64 `[batch, longest]` (labels are not shifted and
        -100 outside the assistant's turns), token-aligned tensors `[batch, longest]` padded with
        zero, media tensors batched as `Family.media` says.
    """
    length = max(len(sample.input_ids) for sample in samples)

    def padded(arrays: Sequence[np.ndarray], fill: int) -> torch.Tensor:
        out = np.full((len(arrays), length), fill, dtype=np.int64)
        for row, array in zip(out, arrays, strict=True):
            if padding_side == "right":
                row[: len(array)] = array
            else:
                row[length - len(array) :] = array
        return torch.from_numpy(out)

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


def _widened(array: np.ndarray) -> torch.Tensor:
    if array.dtype in (np.int8, np.int32):
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array)


class PixelTable:
    """Rescaling and normalisation of uint8 pixels by a table of 256 values per channel.

    The table is what the image processor itself makes of the values 0 to 255, so the result is
    bit-equal to the processor's own float pixels; it moves with the model to its device.

    Parameters
    ----------
    image_processor
        The image processor of the model; its `do_rescale` and `do_normalize` are honoured.
    family
        Tells where the channel axis is.
    """

    def __init__(self, image_processor: Any, family: Family, device: str = "cpu") -> None:
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        values: Any = levels.copy()
        if hasattr(image_processor, "rescale_and_normalize"):
            values = image_processor.rescale_and_normalize(
                torch.from_numpy(values),
                image_processor.do_rescale,
                image_processor.rescale_factor,
                image_processor.do_normalize,
                image_processor.image_mean,
                image_processor.image_std,
            ).numpy()
        else:
            if image_processor.do_rescale:
                values = image_processor.rescale(values, image_processor.rescale_factor)
            if image_processor.do_normalize:
                values = image_processor.normalize(
                    values, image_processor.image_mean, image_processor.image_std
                )
        table = np.ascontiguousarray(values.reshape(3, 256), dtype=np.float32)
        self.table = torch.from_numpy(table).to(device)
        self.family = family

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with float32 `pixel_values` of the same shape; other entries untouched."""
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return batch
        if self.family.channels == "patches":
            values = self._look_up(pixels.view(pixels.shape[0], 3, -1), 1).view(pixels.shape)
        else:
            values = self._look_up(pixels, pixels.dim() + self.family.channels)
        mask = batch.get("pixel_attention_mask")
        if mask is not None:
            values = values * mask.unsqueeze(2).to(values.dtype)
        return {**batch, "pixel_values": values}

    def _look_up(self, pixels: torch.Tensor, axis: int) -> torch.Tensor:
        channels = [self.table[channel][pixels.select(axis, channel).int()] for channel in range(3)]
        return torch.stack(channels, dim=axis)
