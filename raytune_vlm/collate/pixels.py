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
  package itself is not needed. It has no other filters than bilinear and bicubic. Where
  transformers has no Pillow class, the torchvision class itself makes the pixels.
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
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import ModelError
from raytune_vlm.images import decode_pixels
from raytune_vlm.models.families import Family
from raytune_vlm.models.image_backends import ImageBackend, torch_filter


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


class _OwnTorchvision:
    """A torchvision class that makes its own pixels, of uint8 `[height, width, 3]` as well."""

    sizes_only: bool = False

    def process_image(self, image: Any, **_: Any) -> torch.Tensor:
        """An RGB picture (Pillow's, or uint8 `[height, width, 3]`) as `[3, height, width]`."""
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 0)))

    def resize(self, image: torch.Tensor, size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The image as the class resizes it, or zeros of that size; sizes are always exact ones."""
        if self.sizes_only:
            return image.new_zeros(()).expand(*image.shape[:-2], size.height, size.width)
        resized: torch.Tensor = super().resize(image, size, *args, **kwargs)  # type: ignore[misc]
        return resized


class _Crops(_OwnTorchvision):
    """Phi-4's crops without the small picture of the whole, which is made on the device.

    The class resizes that picture as float, so that it could not be stored as uint8. The crops are
    resampled within a longer method: `sizes_only` blanks them and saves no time.
    """

    def resize(self, image: torch.Tensor, size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A stand-in of the right size for the small picture."""
        return image[..., : size.height, : size.width]

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._preprocess(*args, **kwargs)  # type: ignore[misc]
        crops = made["image_pixel_values"][:, 1:]
        made["image_pixel_values"] = crops * 0 if self.sizes_only else crops
        return made


class _PatchBudget:
    """Gemma 4's resizing: the size from its own rule, the resampling from the backend."""

    def aspect_ratio_preserving_resize(
        self,
        image: Any,
        patch_size: int,
        max_patches: int,
        pooling_kernel_size: int,
        resample: Any,
    ) -> Any:
        """uint8 `[3, height, width]` at the largest size that fits the budget of patches."""
        from transformers.models.gemma4.image_processing_pil_gemma4 import (
            get_aspect_ratio_preserving_size,
        )

        height, width = get_aspect_ratio_preserving_size(
            *image.shape[-2:], patch_size, max_patches, pooling_kernel_size
        )
        if image.shape[-2:] == (height, width):
            return image
        backend: Any = self
        return backend.resize(image, SizeDict(height=height, width=width), resample=resample)


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
def _fast_class(cls: Any, channels: int | str) -> type:
    if issubclass(cls, PilBackend):
        bases: list[Any] = [cls, _FastBackend]
    else:
        bases = [_Crops if channels == "crops" else _OwnTorchvision, cls]
    if channels == "patches":
        bases.insert(0, _WholeImages)
    if hasattr(cls, "aspect_ratio_preserving_resize"):
        bases.insert(0, _PatchBudget)
    return type(f"Fast{cls.__name__}", tuple(bases), {})


def fast_image_processor(
    image_processor: Any,
    family: Family,
    backend: ImageBackend | None = None,
    *,
    sizes_only: bool = False,
) -> Any:
    """A copy of an image processor with fast resampling, for RGB input and uint8 output.

    Parameters
    ----------
    backend
        None: that of the processor's class.

    Raises
    ------
    ModelError
        If the processor is none of transformers' classes, or has no Pillow class to resample with.
    """
    cls: Any = type(image_processor)
    own = image_processor.backend if issubclass(cls, PilBackend | TorchvisionBackend) else None
    if own is None or (own == "torchvision" and backend == "pil"):
        raise ModelError(f"{cls.__name__}: its pixels cannot be made with {backend or 'Pillow'}")
    fast = copy.copy(image_processor)
    fast.__class__ = _fast_class(cls, family.channels)
    fast.fast_backend = backend or own
    fast.sizes_only = sizes_only
    return fast


class PixelMaker:
    """Makes the media tensors of a sample that are too large to be stored twice.

    Thread-safe: it keeps no state between calls.

    Parameters
    ----------
    image_processor
        The image processor of the model.
    backend
        None: that of the processor's class.
    """

    def __init__(
        self,
        image_processor: Any,
        family: Family,
        backend: ImageBackend | None,
        limits: ImageLimits,
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
    for own_name, value in made.items():
        name = "pixel_values" if own_name == family.pixels else own_name
        if names is not None and name not in names:
            continue
        array = np.asarray(value)
        if family.media.get(name, "tokens") != "concatenate":
            array = array[0]
        if name == "pixel_values":
            tensors[name] = array if family.channels == "planar" else _bytes(array)
        else:
            tensors[name] = _compact(array)
    return tensors


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels as uint8; refuses to lose anything."""
    if pixels.dtype == np.uint8:
        return pixels
    small = pixels.astype(np.uint8)
    if not np.array_equal(small, pixels):
        raise ModelError("pixels are not whole numbers of 0..255 before normalisation")
    return small


def _compact(array: np.ndarray) -> np.ndarray:
    """Masks as int8, indices as int32."""
    if array.dtype.kind not in "iub":
        return array
    limits = np.iinfo(np.int8)
    fits = array.size == 0 or (array.min() >= limits.min and array.max() <= limits.max)
    return array.astype(np.int8 if fits else np.int32)
