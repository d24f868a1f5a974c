"""Random changes of a training image: a pure function of seed, sample, draw and place."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image, ImageEnhance

from raytune_vlm.config.augmentation import AugmentationConfig
from raytune_vlm.images import jpeg_compressed


def augment(
    image: Image.Image,
    config: AugmentationConfig,
    *,
    seed: int,
    sample_id: str,
    draw: int,
    place: int,
) -> Image.Image:
    """The RGB image changed within the bounds of the config; its size stays.

    The random numbers come from a hash of the keyword arguments (`draw`: which use of a sample in
    the run, `place`: which image of the sample), so neither the number of workers nor a resume
    changes what a sample looks like.
    """
    key = hashlib.blake2b(f"{seed}/{sample_id}/{draw}/{place}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))
    # All are drawn, whatever is on: one setting does not change what the others do.
    unit = generator.uniform(-1, 1, size=4)
    share, across, down, chance, quality = generator.uniform(0, 1, size=5)
    changed = _crop(image, config.min_crop + (1 - config.min_crop) * share, across, down)
    changed = _rotate(changed, unit[0] * config.max_rotation_degrees)
    for enhance, limit, draw in (
        (ImageEnhance.Brightness, config.brightness, unit[1]),
        (ImageEnhance.Contrast, config.contrast, unit[2]),
        (ImageEnhance.Color, config.saturation, unit[3]),
    ):
        if limit:
            changed = enhance(changed).enhance(1 + limit * draw)
    if config.jpeg_quality is not None and chance < config.jpeg_probability:
        low, high = config.jpeg_quality
        changed = jpeg_compressed(changed, low + round((high - low) * quality))
    return changed


def _crop(image: Image.Image, share: float, across: float, down: float) -> Image.Image:
    """`share` of width and height, cut out somewhere and brought back to the whole size."""
    width, height = image.size
    size = math.ceil(width * share), math.ceil(height * share)
    if size == image.size:
        return image
    left, top = round((width - size[0]) * across), round((height - size[1]) * down)
    box = (left, top, left + size[0], top + size[1])
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    if not degrees:
        return image
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    fill = tuple(int(value) for value in np.median(border, axis=0))
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)
