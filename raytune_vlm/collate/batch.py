"""A padded batch as torch tensors; uint8 pixels -> what the vision tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from raytune_vlm.collate.arrays import collate_arrays
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.models.families import Family
from raytune_vlm.models.loading import ImageBackend


def collate(
    samples: Sequence[Encoded],
    family: Family,
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
    pad_to: int = 0,
) -> dict[str, torch.Tensor]:
    """`collate_arrays` as tensors."""
    arrays = collate_arrays(
        samples, family, pad_token_id=pad_token_id, padding_side=padding_side, pad_to=pad_to
    )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PixelTable:
    """Rescaling and normalisation of uint8 pixels by a table of 256 values per channel.

    The table is what the image processor's backend makes of the values 0 to 255, so the result is
    bit-equal to the processor's own float pixels; it moves with the model to its device. Whole
    images of families that take patches are cut here too.

    Parameters
    ----------
    image_processor
        The image processor of the model; its `do_rescale` and `do_normalize` are honoured.
    family
        Tells where the channel axis is.
    backend
        Pillow's classes rescale and normalise in two steps, torchvision's in one
        (`transformers/image_processing_backends.py`); the last bit differs.
    """

    def __init__(
        self,
        image_processor: Any,
        family: Family,
        device: str = "cpu",
        *,
        backend: ImageBackend = "pil",
    ) -> None:
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256)).copy()
        make = _torchvision_levels if backend == "torchvision" else _pil_levels
        table = np.ascontiguousarray(make(image_processor, levels).reshape(3, 256), np.float32)
        self.table = torch.from_numpy(table).to(device)
        self.family = family
        self._patch = {
            name: getattr(image_processor, name, 1)
            for name in ("patch_size", "merge_size", "temporal_patch_size")
        }

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with the float32 `pixel_values` of the family; other entries untouched."""
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return batch
        if self.family.channels == "patches":
            values = self._patches(pixels, batch["image_grid_thw"])
        elif self.family.channels == "interleaved":
            colours = pixels.unflatten(-1, (-1, 3))
            values = self._look_up(colours, colours.dim() - 1).flatten(-2)
        else:
            values = self._look_up(pixels, pixels.dim() + self.family.channels)
        return {**batch, "pixel_values": self._without_padding(values, batch)}

    @staticmethod
    def _without_padding(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Padding as the processors make it, after normalisation: zeros."""
        if "pixel_attention_mask" in batch:  # [samples, tiles, height, width]
            return values * batch["pixel_attention_mask"].unsqueeze(2).to(values.dtype)
        if "aspect_ratio_mask" in batch:  # [samples, images, tiles]
            return values * batch["aspect_ratio_mask"][..., None, None, None].to(values.dtype)
        return values

    def _patches(self, flat: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """`[patches, 3 * t * p * p]` of flat channels-first images, in the order of Qwen2-VL.

        transformers/models/qwen2_vl/image_processing_pil_qwen2_vl.py, `patchify`.
        """
        size, merge = self._patch["patch_size"], self._patch["merge_size"]
        frames = self._patch["temporal_patch_size"]
        made, start = [], 0
        for _, down, across in grids.tolist():
            end = start + down * across * size * size * 3
            image = self._look_up(flat[start:end].view(3, down * size, across * size), 0)
            blocks = image.view(
                3, down // merge, merge, size, across // merge, merge, size
            ).permute(1, 4, 2, 5, 0, 3, 6)
            twice = blocks.unsqueeze(5).expand(*blocks.shape[:5], frames, size, size)
            made.append(twice.reshape(down * across, -1))
            start = end
        return torch.cat(made)

    def _look_up(self, pixels: torch.Tensor, axis: int) -> torch.Tensor:
        channels = [self.table[channel][pixels.select(axis, channel).int()] for channel in range(3)]
        return torch.stack(channels, dim=axis)


def _pil_levels(image_processor: Any, levels: np.ndarray) -> np.ndarray:
    values: Any = levels
    if image_processor.do_rescale:
        values = image_processor.rescale(values, image_processor.rescale_factor)
    if image_processor.do_normalize:
        values = image_processor.normalize(
            values, image_processor.image_mean, image_processor.image_std
        )
    return np.asarray(values)


def _torchvision_levels(image_processor: Any, levels: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(levels).to(torch.float32)
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    if image_processor.do_normalize:
        mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
        deviation = torch.tensor(image_processor.image_std).view(3, 1, 1)
        if image_processor.do_rescale:  # fused: the inverse factor goes into both
            mean, deviation = mean * (1.0 / factor), deviation * (1.0 / factor)
        values = values.sub(mean).div(deviation)
    elif image_processor.do_rescale:
        values = torch.from_numpy(levels) * factor
    return values.numpy()
