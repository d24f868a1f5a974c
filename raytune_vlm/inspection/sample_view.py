"""One sample as the model will see it: its images, its token stream, what carries loss."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.images import thumbnail
from raytune_vlm.inspection.pictures import Given, given_images
from raytune_vlm.inspection.rows import Checked, Row
from raytune_vlm.inspection.text import line
from raytune_vlm.inspection.tokens import Piece, count_image_tokens, pieces_of
from raytune_vlm.records import Quarantined
from raytune_vlm.visible import visible

if TYPE_CHECKING:
    from raytune_vlm.collate.encode import Encoder

MAX_SIDE = 512
"""Longest side, in pixels, of a picture in the page."""

MAX_PNG_BYTES = 200_000
"""A larger picture becomes a JPEG."""

_MAGIC = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP"}


@dataclass(frozen=True)
class ImageView:
    """One image: in its file, and as the model gets it."""

    format: str
    num_bytes: int
    width: int
    height: int
    given: Given | None
    """None where the tensors cannot tell it image by image."""
    file_uri: str = ""
    given_uri: str = ""


@dataclass(frozen=True)
class SampleView:
    """A sample; all text in it is safe to show."""

    number: int
    origin: str
    sample_id: str
    group_id: str
    split: str
    is_prompt: bool
    num_turns: int
    images: tuple[ImageView, ...]
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_image_tokens: int
    num_labelled: int
    reference: str
    """What the answer is compared with; empty for training samples, whose answers are labelled."""
    over_long: bool
    """Longer than `data.max_length`."""


@dataclass(frozen=True)
class RefusedView:
    """A row that was quarantined, in its place among the others."""

    number: int
    origin: str
    split: str
    reason: str


def view_of(
    row: Row, number: int, encoder: Encoder, *, max_length: int, limits: ImageLimits, pictures: bool
) -> SampleView | RefusedView:
    """A row as it is shown; with `pictures`, images as data URIs."""
    if isinstance(row, Quarantined):
        return RefusedView(number, line(row.origin), row.split, line(row.reason))
    assert row.encoded is not None
    pieces = pieces_of(row.encoded, encoder.processor)
    num_tokens = len(row.encoded.input_ids)
    return SampleView(
        number=number,
        origin=line(row.sample.origin),
        sample_id=row.sample.sample_id,
        group_id=line(row.sample.group_id, 80),
        split=row.split,
        is_prompt=row.is_prompt,
        num_turns=len(row.sample.messages),
        images=_images(row, pieces, encoder, limits, pictures),
        pieces=tuple(pieces),
        num_tokens=num_tokens,
        num_image_tokens=count_image_tokens(row.encoded, encoder.processor),
        num_labelled=row.encoded.num_labelled,
        reference=visible(row.sample.answer) if row.is_prompt else "",
        over_long=num_tokens > max_length,
    )


def format_of(data: bytes) -> str:
    """The format of an image file by its first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "other")


def _images(
    row: Checked, pieces: list[Piece], encoder: Encoder, limits: ImageLimits, pictures: bool
) -> tuple[ImageView, ...]:
    assert row.encoded is not None
    files = row.sample.images
    given = given_images(row.encoded, encoder.processor, pieces, len(files))
    places: list[Given | None] = [*given] if len(given) == len(files) else [None] * len(files)
    views = []
    for data, (width, height), entry in zip(files, row.sizes, places, strict=True):
        file_uri = given_uri = ""
        if pictures:
            file_uri = _uri(thumbnail(data, limits, MAX_SIDE), "jpeg")
        if pictures and entry is not None and entry.pixels is not None:
            given_uri = picture_uri(entry.pixels)
        views.append(
            ImageView(format_of(data), len(data), width, height, entry, file_uri, given_uri)
        )
    return tuple(views)


def picture_uri(pixels: np.ndarray) -> str:
    """uint8 `[height, width, 3]` as a data URI, its longer side at most `MAX_SIDE`."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    if buffer.tell() <= MAX_PNG_BYTES:
        return _uri(buffer.getvalue(), "png")
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return _uri(buffer.getvalue(), "jpeg")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
