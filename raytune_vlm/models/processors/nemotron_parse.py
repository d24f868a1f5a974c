"""Nemotron-Parse: one page, scaled down to fit 2048 by 1648 pixels, on white.

Rules from vllm-project/vllm, vllm/model_executor/models/nemotron_parse.py and the published
processor: a page that fits is not scaled; the scaling is bilinear without antialiasing (OpenCV's;
Pillow's `transform` has it, within one level); the page stands in the middle, as albumentations'
`PadIfNeeded` puts it. The vision tower of version 1.1 normalises its input itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend

WHITE = 255


class NemotronParseImages(PilBackend):
    """`pixel_values` `[images, 3, height, width]`."""

    model_input_names = ("pixel_values",)
    size: ClassVar[dict[str, int]] = {"height": 2048, "width": 1648}
    do_rescale = True
    do_normalize = False
    image_mean = (0.0, 0.0, 0.0)
    image_std = (1.0, 1.0, 1.0)
    do_convert_rgb = True

    def _preprocess(
        self,
        images: list[np.ndarray],
        *,
        size: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any,
        **_: Any,
    ) -> BatchFeature:
        """Images `[3, height, width]` -> pages of the model's size."""
        blank = getattr(self, "sizes_only", False)
        pages = []
        for image in images:
            page = np.full((3, size.height, size.width), 0 if blank else WHITE, dtype=np.uint8)
            if not blank:
                height, width = image.shape[1:]
                image = _shrunk(image, *fitting_size(height, width, size.height, size.width))
                top = (size.height - image.shape[1]) // 2
                left = (size.width - image.shape[2]) // 2
                page[:, top : top + image.shape[1], left : left + image.shape[2]] = image
            made: Any = page
            if do_rescale:
                made = self.rescale(made, rescale_factor)
            if do_normalize:
                made = self.normalize(made, image_mean, image_std)
            pages.append(made)
        return BatchFeature(data={"pixel_values": np.stack(pages)}, tensor_type=return_tensors)


class NemotronParseProcessor(ProcessorMixin):
    """Image processor and tokenizer; the decoder's prompt is `collate.single_turn`'s."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(image_processor, tokenizer)


def build(
    tokenizer: Any, config: dict[str, Any], preprocessor: dict[str, Any]
) -> NemotronParseProcessor:
    """The processor of a model."""
    default = (NemotronParseImages.size["height"], NemotronParseImages.size["width"])
    height, width = preprocessor.get("final_size") or config.get("image_size") or default
    given = {
        name: preprocessor[name]
        for name in ("do_normalize", "image_mean", "image_std")
        if name in preprocessor
    }
    images = NemotronParseImages(size={"height": height, "width": width}, **given)
    return NemotronParseProcessor(images, tokenizer)


def fitting_size(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """Height and width that fit, the aspect ratio kept; never larger than they were."""
    ratio = width / height
    new_height, new_width = height, width
    if new_height > max_height:
        new_height, new_width = max_height, int(max_height * ratio)
    if new_width > max_width:
        new_height, new_width = int(max_width / ratio), max_width
    return max(1, new_height), max(1, new_width)


def _shrunk(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[1:] == (height, width):
        return image
    picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
    scale = picture.width / width, picture.height / height
    made = picture.transform(
        (width, height),
        Image.Transform.AFFINE,
        (scale[0], 0, 0, 0, scale[1], 0),
        Image.Resampling.BILINEAR,
    )
    return np.moveaxis(np.asarray(made), -1, 0)
