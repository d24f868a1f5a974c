"""Where samples come from: one reader a format, by the `type` of `raytune_vlm.config.sources`."""

from raytune_vlm.sources import (
    cord,
    image_text,
    llamafactory,
    messages,
    pdf,
    prompt_completion,
    python,
    sharegpt,
    sroie,
    table,
    webdataset,
)
from raytune_vlm.sources.base import Reader, Shard

SOURCES: dict[str, Reader] = {
    "messages": messages.READER,
    "sharegpt": sharegpt.READER,
    "prompt_completion": prompt_completion.READER,
    "image_text": image_text.READER,
    "cord": cord.READER,
    "sroie": sroie.READER,
    "webdataset": webdataset.READER,
    "llamafactory": llamafactory.READER,
    "python": python.READER,
    "table": table.READER,
    "pdf": pdf.READER,
}

__all__ = ["SOURCES", "Reader", "Shard"]
