"""Prompts with other images than their own, encoded again as `prepare` encodes them.

Decoded images are altered, and the whole conversation goes through the processor anew: a picture of
another size has other tokens. Everything here is deterministic.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageFilter

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.images import decode
from raytune_vlm.models.loading import Base
from raytune_vlm.prepare.store import PreparedSplit

GREY = (128, 128, 128)

Pictures = Callable[[int], list[Image.Image] | None]
"""Row -> the images to ask with; None: ask without any."""


class AlteredPrompts:
    """Some rows of a split with other images.

    Parameters
    ----------
    rows
        Those that will be asked for; their lengths are found at once, without resampling.

    Raises
    ------
    SampleRefused
        If the family cannot be asked so.
    DataError
        If the store does not hold the messages.
    """

    def __init__(
        self, split: PreparedSplit, base: Base, rows: Sequence[int], pictures: Pictures
    ) -> None:
        self._split, self._pictures = split, pictures
        self._encoder = Encoder(base.processor, base.family, base.image_backend)
        sizes = Encoder(base.processor, base.family, base.image_backend, sizes_only=True)
        self.lengths = split.lengths.copy()
        self.num_images = split.num_images.copy()
        for row in rows:
            messages, images, tools = self._sample(row)
            self.lengths[row] = len(sizes.prompt(messages, images, tools).input_ids)
            self.num_images[row] = len(images)

    @property
    def sample_ids(self) -> list[str]:
        """The id of each row."""
        return self._split.sample_ids

    @property
    def group_ids(self) -> list[str]:
        """The group of each row."""
        return self._split.group_ids

    def encoded(self, number: int) -> Encoded:
        """The prompt of a row with its altered images."""
        return self._encoder.prompt(*self._sample(number))

    def text(self, number: int, column: str) -> str:
        """`prompt` or `reference` of a row."""
        return self._split.text(number, column)

    def _sample(
        self, row: int
    ) -> tuple[list[dict[str, Any]], list[Image.Image], list[dict[str, Any]]]:
        messages, tools = self._split.conversation(row)
        images = self._pictures(row)
        if images is None:
            messages = [
                {**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}
                for turn in messages
            ]
        return messages, images or [], tools


def own_pictures(split: PreparedSplit, limits: ImageLimits, row: int) -> list[Image.Image]:
    """The images of a row, decoded."""
    return [decode(image, limits) for image in split.images(row)]


def grey(image: Image.Image) -> Image.Image:
    """A grey image of the same size."""
    return Image.new("RGB", image.size, GREY)


def partners(split: PreparedSplit, rows: Sequence[int], seed: int) -> dict[int, int]:
    """Row -> the row whose images it gets: never its own, and as many as it has.

    Rows are shuffled within those of equal image counts, and each takes the next one's. A row that
    is alone with its count is left out, and so are rows without images.
    """
    by_count: dict[int, list[int]] = {}
    for row in sorted(rows):
        if split.num_images[row]:
            by_count.setdefault(int(split.num_images[row]), []).append(row)
    found: dict[int, int] = {}
    for count, members in sorted(by_count.items()):
        if len(members) > 1:
            random.Random(f"{seed}/{count}").shuffle(members)
            found |= dict(zip(members, [*members[1:], members[0]], strict=True))
    return found


def jpeg(image: Image.Image, quality: float, limits: ImageLimits) -> Image.Image:
    """The image after a JPEG file of that quality."""
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=int(quality))
    return decode(stream.getvalue(), limits)


def blurred(image: Image.Image, sigma: float, limits: ImageLimits) -> Image.Image:
    """The image after a Gaussian blur (Pillow's, by box filters)."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def rotated(image: Image.Image, degrees: float, limits: ImageLimits) -> Image.Image:
    """The image turned counter-clockwise about its middle, in its own frame."""
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=GREY)


def scaled(image: Image.Image, factor: float, limits: ImageLimits) -> Image.Image:
    """The image at a part of its size, at least one pixel a side."""
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


ALTERATIONS: dict[str, Callable[[Image.Image, float, ImageLimits], Image.Image]] = {
    "jpeg_quality": jpeg,
    "blur_sigma": blurred,
    "rotation_degrees": rotated,
    "scale": scaled,
}
"""Key of `evaluation.robustness` -> what it does to an image."""
