"""Kimi-VL: images at their own size, cut into patches of 14 pixels, four patches a token.

Rules from vllm-project/vllm, vllm/model_executor/models/kimi_vl.py: an image of more than
`in_token_limit` patches is scaled down to that many; then it is padded below and on the right with
black to whole groups of `merge_kernel_size` patches (with `pad_input`), or cut to them around its
centre.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs

IMAGE_TOKEN = "<|media_pad|>"

MAX_SIDE = 512
"""Patches along a side for which the vision tower has positions."""


class KimiVLImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The settings beyond those of every image processor."""

    patch_size: int
    merge_kernel_size: tuple[int, int]
    in_token_limit: int
    pad_input: bool


class KimiVLImages(PilBackend):
    """`pixel_values` `[patches, 3, patch, patch]` and `image_grid_hws` `[images, 2]`."""

    valid_kwargs = KimiVLImagesKwargs
    model_input_names = ("pixel_values", "image_grid_hws")
    resample = 3  # bicubic
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    patch_size = 14
    merge_kernel_size = (2, 2)
    in_token_limit = 4096
    pad_input = True

    def _preprocess(
        self,
        images: list[np.ndarray],
        *,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any,
        patch_size: int,
        merge_kernel_size: tuple[int, int],
        in_token_limit: int,
        pad_input: bool,
        **_: Any,
    ) -> BatchFeature:
        """Images `[3, height, width]` -> patches, row by row; raises ValueError for a huge one."""
        patches, grids = [], []
        step = (patch_size * merge_kernel_size[0], patch_size * merge_kernel_size[1])
        for image in images:
            height, width = image.shape[1:]
            height, width = scaled_size(height, width, patch_size, in_token_limit)
            if (height, width) != image.shape[1:]:
                image = self.resize(image, SizeDict(height=height, width=width), resample)
            image = _padded(image, step) if pad_input else _cut(image, step)
            rows, columns = (size // patch_size for size in image.shape[1:])
            if not 0 < rows < MAX_SIDE or not 0 < columns < MAX_SIDE:
                raise ValueError(f"{rows} x {columns} patches: must be from 1 to {MAX_SIDE - 1}")
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            blocks = image.reshape(3, rows, patch_size, columns, patch_size)
            patches.append(blocks.transpose(1, 3, 0, 2, 4).reshape(-1, 3, patch_size, patch_size))
            grids.append((rows, columns))
        data = {"pixel_values": np.concatenate(patches), "image_grid_hws": np.array(grids)}
        return BatchFeature(data=data, tensor_type=return_tensors)


class KimiVLProcessor(ProcessorMixin):
    """One `<|media_pad|>` of the chat template becomes one a group of patches."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """The tokens of one image."""
        rows, columns = (int(size) for size in image_inputs["image_grid_hws"][image_idx])
        return IMAGE_TOKEN * (rows * columns // math.prod(self.image_processor.merge_kernel_size))


def build(tokenizer: Any, config: dict[str, Any], preprocessor: dict[str, Any]) -> KimiVLProcessor:
    """The processor of a model."""
    names = (*KimiVLImagesKwargs.__annotations__, "image_mean", "image_std")
    given = {name: preprocessor[name] for name in names if name in preprocessor}
    return KimiVLProcessor(KimiVLImages(**given), tokenizer, tokenizer.chat_template)


def scaled_size(height: int, width: int, patch_size: int, limit: int) -> tuple[int, int]:
    """Height and width with about `limit` whole patches at most."""
    patches = (width // patch_size) * (height // patch_size)
    if patches <= limit:
        return height, width
    scale = math.sqrt(limit / patches)
    return int(height * scale), int(width * scale)


def _padded(image: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    missing = [-size % unit for size, unit in zip(image.shape[1:], step, strict=True)]
    return np.pad(image, ((0, 0), (0, missing[0]), (0, missing[1])))


def _cut(image: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    height, width = (size - size % unit for size, unit in zip(image.shape[1:], step, strict=True))
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]
