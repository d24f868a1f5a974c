"""The forms in which a row can hold an image, read to the bytes of the image file.

A path, a base64 `data:` URI, bytes, or the struct of Hugging Face datasets, `{bytes, path}`.
Nothing is decoded, and nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.sources.base import RowError, Shard, shorten
from raytune_vlm.sources.files import read_image


def load_image(value: Any, shard: Shard, limits: ImageLimits) -> bytes:
    """The encoded bytes of an image; raises RowError where there is none or it is refused."""
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        if content is not None and not isinstance(content, bytes):
            raise RowError(f"image bytes must be binary, not {type(content).__name__}")
        value = content if content is not None else path
    if value is None:
        raise RowError("image is null")
    if isinstance(value, bytes):
        data = value
    elif not isinstance(value, str):
        raise RowError(
            f"image must be a path, bytes or {{bytes, path}}, not {type(value).__name__}"
        )
    elif value[:5].lower() == "data:":
        data = _decode_uri(value, limits)
    elif not value.strip():
        raise RowError("image path is empty")
    else:
        data = read_image(value, shard, limits.max_bytes)
    if not data:
        raise RowError("image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise RowError(f"image has {len(data)} bytes, the limit is {limits.max_bytes}")
    return data


def _decode_uri(uri: str, limits: ImageLimits) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError(f"image is a data URI without ';base64,': {shorten(head, 40)}")
    if len(body) * 3 // 4 > limits.max_bytes * 1.1 + 16:  # line breaks are part of the length
        raise RowError(f"image has more than {limits.max_bytes} bytes (data URI)")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"image is malformed base64: {error}") from error
