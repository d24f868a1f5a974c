"""Where samples come from: one reader a format, by the `type` of `raytune_vlm.config.data`."""

from raytune_vlm.sources import cord, image_text, messages, sharegpt, sroie
from raytune_vlm.sources.base import Reader, Shard

SOURCES: dict[str, Reader] = {
    "messages": messages.READER,
    "sharegpt": sharegpt.READER,
    "image_text": image_text.READER,
    "cord": cord.READER,
    "sroie": sroie.READER,
}

__all__ = ["SOURCES", "Reader", "Shard"]
