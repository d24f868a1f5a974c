"""A padded batch as torch tensors; uint8 pixels -> what the vision tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from raytune_vlm.collate.arrays import collate_arrays
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.models.families import Family
from raytune_vlm.models.image_backends import ImageBackend, torch_filter


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
    bit-equal to the processor's own float pixels; it moves with the model to its device. What
    `Family.channels` leaves to the device is done here too: patches are cut, Phi-4's small
    pictures made.

    Parameters
    ----------
    image_processor
        The image processor of the model; its `do_rescale` and `do_normalize` are honoured.
    family
        Tells where the channel axis is.
    backend
        Pillow's classes rescale and normalise in two steps, torchvision's in one
        (`transformers/image_processing_backends.py`); the last bit differs. None: that of the
        image processor's class.
    """

    def __init__(
        self,
        image_processor: Any,
        family: Family,
        device: str = "cpu",
        *,
        backend: ImageBackend | None = None,
    ) -> None:
        if (backend or image_processor.backend) == "torchvision":
            table = _torchvision_values(image_processor, torch.arange(256).expand(3, 256))
        else:
            table = _pil_levels(image_processor)
        self.table = table.to(device)
        self.family = family
        self._image_processor = image_processor
        self._patch = {
            name: getattr(image_processor, name, 1)
            for name in ("patch_size", "merge_size", "temporal_patch_size")
        }

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with the family's float32 pixels, under its name for them.

        Other entries are untouched, but for the mask of Phi-4's crops (`_with_overviews`).
        """
        if "pixel_values" not in batch:
            return batch
        rest = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
        pixels, channels = batch["pixel_values"], self.family.channels
        if channels == "patches":
            values = self._patches(pixels, batch["image_grid_thw"])
        elif channels == "interleaved":
            colours = pixels.unflatten(-1, (-1, 3))
            values = self._look_up(colours, colours.dim() - 1).flatten(-2)
        elif channels == "planar":
            colours = pixels.unflatten(-1, (3, -1))
            values = _torchvision_values(self._image_processor, colours).flatten(-2)
        elif channels == "crops":
            values, rest["image_attention_mask"] = self._with_overviews(pixels, batch)
        else:
            values = self._look_up(pixels, pixels.dim() + channels)
        return {**rest, self.family.pixels: self._without_padding(values, batch)}

    def _without_padding(
        self, values: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Padding as the processors make it, after normalisation: zeros."""
        if "pixel_attention_mask" in batch:  # [samples, tiles, height, width]
            return values * batch["pixel_attention_mask"].unsqueeze(2).to(values.dtype)
        if "aspect_ratio_mask" in batch:  # [samples, images, tiles]
            return values * batch["aspect_ratio_mask"][..., None, None, None].to(values.dtype)
        if self.family.padded_images:
            for image, (height, width) in zip(values, batch["image_sizes"].tolist(), strict=True):
                image[:, height:] = 0
                image[:, :, width:] = 0
        return values

    def _with_overviews(
        self, pixels: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Phi-4's crops with the small picture of the whole ahead, and the mask of their patches.

        `[images, 1 + crops, 3, side, side]` and `[images, 1 + crops, patches, patches]`. An image
        with fewer crops than others is filled up with zeros, which the mask does not hide
        (transformers/models/phi4_multimodal/image_processing_phi4_multimodal.py).
        """
        crops = self._look_up(pixels, pixels.dim() - 3)
        side = crops.shape[-1]
        values = crops.new_zeros((len(crops), 1 + crops.shape[1], *crops.shape[2:]))
        mask = batch["image_attention_mask"].clone()
        for number, (height, width) in enumerate(batch["image_sizes"].tolist()):
            down, across = height // side, width // side
            own = crops[number, : down * across]
            whole = own.unflatten(0, (down, across)).permute(2, 0, 3, 1, 4)
            small = whole.reshape(1, 3, height, width)
            if (height, width) != (side, side):
                mode = torch_filter(self._image_processor.resample)
                small = torch.nn.functional.interpolate(
                    small, size=(side, side), mode=mode, align_corners=False
                )
            values[number, : 1 + len(own)] = torch.cat([small, own])
            mask[number, 1 + len(own) :] = 1
        return values, mask

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


def _pil_levels(image_processor: Any) -> torch.Tensor:
    """float32 `[3, 256]`."""
    values: Any = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256)).copy()
    if image_processor.do_rescale:
        values = image_processor.rescale(values, image_processor.rescale_factor)
    if image_processor.do_normalize:
        values = image_processor.normalize(
            values, image_processor.image_mean, image_processor.image_std
        )
    return torch.from_numpy(np.ascontiguousarray(values.reshape(3, 256), np.float32))


def _torchvision_values(image_processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """float32 `[..., 3, n]` of pixels `[..., 3, n]` between 0 and 255."""
    values = pixels.to(torch.float32)
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    if not image_processor.do_normalize:
        return values * factor
    mean, deviation = (
        torch.tensor(numbers, device=pixels.device).view(3, 1)
        for numbers in (image_processor.image_mean, image_processor.image_std)
    )
    if image_processor.do_rescale:  # fused: the inverse factor goes into both
        mean, deviation = mean * (1.0 / factor), deviation * (1.0 / factor)
    return values.sub(mean).div(deviation)
