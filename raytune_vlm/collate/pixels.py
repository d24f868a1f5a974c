"""Encoded images -> the uint8 pixels that a model's image processor would make, fast and exact.

An image processor of transformers does three things: it chooses sizes and tiles, it resamples, and
it converts to normalised float patches. The first is kept as it is, whatever the family, by
subclassing the processor's own class; the second is done on uint8 with the kernels of the named
backend; the third waits for the device (`collate.batch.PixelTable`). The pixels are bit-equal to
those of the processor (tests/test_pixels.py).

Backends, as transformers names them:

- `pil`: Pillow's resampling.
- `torchvision`: torchvision resizes uint8 tensors with torch's antialiased kernels
  (`torchvision/transforms/v2/functional/_geometry.py`), which are called here directly, so the
  package itself is not needed. It has no other filters than bilinear and bicubic.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import ModelError
from raytune_vlm.images import decode_pixels
from raytune_vlm.models.families import Family
from raytune_vlm.models.loading import ImageBackend, torch_filter


class _FastBackend(PilBackend):
    """`PilBackend` on uint8 arrays `[3, height, width]`, whatever their layout in memory."""

    fast_backend: ImageBackend = "pil"
    sizes_only: bool = False
    """Skip the resampling: the pixels are zeros, sizes and token counts are right."""

    def process_image(self, image: Any, **_: Any) -> np.ndarray:
        """An RGB picture (Pillow's, or uint8 `[height, width, 3]`) as `[3, height, width]`."""
        return np.moveaxis(np.asarray(image), -1, 0)

    def resize(
        self,
        image: np.ndarray,
        size: Any,
        resample: Any = None,
        reducing_gap: int | None = None,
        **_: Any,
    ) -> np.ndarray:
        """uint8 `[3, height, width]` at the size that `PilBackend.resize` would choose."""
        height, width = _target_size(image, size)
        if self.sizes_only:
            return np.broadcast_to(np.uint8(0), (3, height, width))
        if self.fast_backend == "pil":
            filter_ = Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
            picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
            resized = picture.resize((width, height), filter_, reducing_gap=reducing_gap)
            return np.moveaxis(np.asarray(resized), -1, 0)
        mode = torch_filter(resample)
        if image.shape[1:] == (height, width):
            return image
        pixels = torch.from_numpy(image if image.flags.writeable else image.copy())
        resized = torch.nn.functional.interpolate(
            pixels[None], size=(height, width), mode=mode, antialias=True
        )
        return np.asarray(resized[0].numpy())


class _WholeImages:
    """Leaves images whole where the processor would cut them into patches (the Qwen family)."""

    def patchify(
        self, image: np.ndarray, patch_size: int, *_: Any, **__: Any
    ) -> tuple[np.ndarray, int, int]:
        """Flat channels-first pixels `[3 * height * width]`, and the patch grid."""
        _, height, width = image.shape
        return image.reshape(-1), height // patch_size, width // patch_size


class _PatchBudget(_FastBackend):
    """Gemma 4's resizing: the size from its own rule, the resampling from the backend."""

    def aspect_ratio_preserving_resize(
        self,
        image: np.ndarray,
        patch_size: int,
        max_patches: int,
        pooling_kernel_size: int,
        resample: Any,
    ) -> np.ndarray:
        """uint8 `[3, height, width]` at the largest size that fits the budget of patches."""
        from transformers.models.gemma4.image_processing_pil_gemma4 import (
            get_aspect_ratio_preserving_size,
        )

        height, width = get_aspect_ratio_preserving_size(
            *image.shape[-2:], patch_size, max_patches, pooling_kernel_size
        )
        if image.shape[-2:] == (height, width):
            return image
        return self.resize(image, SizeDict(height=height, width=width), resample)


def _target_size(image: np.ndarray, size: Any) -> tuple[int, int]:
    """Height and width that `PilBackend.resize` resizes to, by the same rules in the same order."""
    height, width = image.shape[-2:]
    if size.shortest_edge and size.longest_edge:
        found: Any = get_size_with_aspect_ratio(
            (height, width), size.shortest_edge, size.longest_edge
        )
    elif size.shortest_edge:
        found = get_resize_output_image_size(
            image,
            size=size.shortest_edge,
            default_to_square=False,
            input_data_format="channels_first",
        )
    elif size.max_height and size.max_width:
        found = get_image_size_for_max_height_width(
            (height, width), size.max_height, size.max_width
        )
    else:
        found = (size.height, size.width)
    return int(found[0]), int(found[1])


@lru_cache(maxsize=32)
def _fast_class(cls: Any, whole: bool) -> type:
    bases = [cls, _FastBackend]
    if whole:
        bases.insert(0, _WholeImages)
    if hasattr(cls, "aspect_ratio_preserving_resize"):
        bases.insert(0, _PatchBudget)
    return type(f"Fast{cls.__name__}", tuple(bases), {})


def fast_image_processor(
    image_processor: Any, family: Family, backend: ImageBackend, *, sizes_only: bool = False
) -> Any:
    """A copy of an image processor with fast resampling, for RGB input and uint8 output.

    Raises
    ------
    ModelError
        If the processor's class is not one of transformers' Pillow classes.
    """
    cls: Any = type(image_processor)
    if not issubclass(cls, PilBackend):
        raise ModelError(
            f"{cls.__name__} is not built on transformers' PilBackend: its pixels cannot be made"
        )
    fast = copy.copy(image_processor)
    fast.__class__ = _fast_class(cls, family.channels == "patches")
    fast.fast_backend = backend
    fast.sizes_only = sizes_only
    return fast


class PixelMaker:
    """Makes the media tensors of a sample that are too large to be stored twice.

    Thread-safe: it keeps no state between calls.

    Parameters
    ----------
    image_processor
        The image processor of the model.
    """

    def __init__(
        self, image_processor: Any, family: Family, backend: ImageBackend, limits: ImageLimits
    ) -> None:
        self._fast = fast_image_processor(image_processor, family, backend)
        self._family, self._limits = family, limits
        # What `preprocess` does at each call before it comes to the images.
        settings = {
            name: getattr(self._fast, name, None) for name in self._fast._valid_kwargs_names
        }
        settings |= {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        self._settings = self._fast._standardize_kwargs(**settings)
        self._counts_images = "batch_num_images" in signature(self._fast._preprocess).parameters

    def decode(self, images: Sequence[bytes]) -> dict[str, np.ndarray]:
        """The pixel tensors of one sample's images; raises ImageError for a broken one."""
        return self.make(self.open(images))

    def open(self, images: Sequence[bytes]) -> list[np.ndarray]:
        """The pictures themselves, uint8 `[height, width, 3]` each."""
        return [decode_pixels(image, self._limits) for image in images]

    def make(self, pictures: Sequence[Any]) -> dict[str, np.ndarray]:
        """The pixel tensors of one sample's pictures (Pillow's or uint8 `[h, w, 3]`)."""
        if not pictures:
            return {}
        counts = ([len(pictures)],) if self._counts_images else ()
        made = self._fast._preprocess_image_like_inputs([list(pictures)], *counts, **self._settings)
        return media_tensors(made, self._family, PIXEL_NAMES)


PIXEL_NAMES = ("pixel_values", "pixel_attention_mask")
"""The media tensors that are made from pixels; the others are small and stored with the tokens."""


def media_tensors(
    made: Any, family: Family, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """A processor's output for one sample as compact arrays, the batch dimension taken off."""
    tensors = {}
    for name, value in made.items():
        if names is not None and name not in names:
            continue
        array = np.asarray(value)
        if family.media.get(name, "tokens") != "concatenate":
            array = array[0]
        tensors[name] = _compact(name, array)
    return tensors


def _compact(name: str, array: np.ndarray) -> np.ndarray:
    """Pixels as uint8, masks as int8, indices as int32; refuses to lose anything."""
    if name == "pixel_values" and array.dtype != np.uint8:
        small = array.astype(np.uint8)
        if not np.array_equal(small, array):
            raise ModelError(
                f"{name} holds values that are not whole numbers of 0..255 before normalisation"
            )
        return small
    if name != "pixel_values" and array.dtype.kind in "iub":
        limits = np.iinfo(np.int8)
        fits = array.size == 0 or (array.min() >= limits.min and array.max() <= limits.max)
        return array.astype(np.int8 if fits else np.int32)
    return array
