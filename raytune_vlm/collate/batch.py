"""A padded batch as torch tensors; uint8 pixels -> what the vision tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from raytune_vlm.collate.arrays import collate_arrays
from raytune_vlm.collate.encode import Encoded
from raytune_vlm.models.families import Family


def collate(
    samples: Sequence[Encoded],
    family: Family,
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
) -> dict[str, torch.Tensor]:
    """`collate_arrays` as tensors."""
    arrays = collate_arrays(samples, family, pad_token_id=pad_token_id, padding_side=padding_side)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


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
