"""Whose resampling makes the pixels: Pillow's or torchvision's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from PIL import Image

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError

ImageBackend = Literal["pil", "torchvision"]

_TORCH_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
"""The filters that torch has for uint8 images."""


def torch_filter(resample: int | None) -> str:
    """torch's name of one of Pillow's filters; None is bilinear, as in transformers.

    Raises
    ------
    ModelError
        If torch does not have it.
    """
    filter_ = Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
    if filter_ not in _TORCH_FILTERS:
        raise ModelError(
            "model.image_backend=torchvision: the image processor resizes with "
            f"{filter_.name}, which torch does not have; use model.image_backend: pil"
        )
    return _TORCH_FILTERS[filter_]


def image_backend(config: ModelConfig, image_processor: Any) -> ImageBackend:
    """The backend that `model.image_backend` means for a processor on this machine.

    Raises
    ------
    ModelError
        If torchvision's resampling is asked for and the processor's filter is not one of torch's,
        or Pillow's where the processor has no class for it.
    """
    if image_processor.backend == "torchvision":
        if config.image_backend == "pil":
            raise ModelError(
                f"model.image_backend=pil: {type(image_processor).__name__} has torchvision's "
                "resampling only; use model.image_backend: torchvision"
            )
        return "torchvision"
    resample: Any = getattr(image_processor, "resample", None)
    if config.image_backend == "auto":
        possible = resample is None or resample in _TORCH_FILTERS
        return "torchvision" if find_spec("torchvision") and possible else "pil"
    if config.image_backend == "torchvision":
        torch_filter(resample)
    return config.image_backend
