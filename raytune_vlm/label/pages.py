"""What is to be labelled: image files, pages of documents, whole documents, images of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raytune_vlm.config.label import LabelConfig
from raytune_vlm.config.sources import Source
from raytune_vlm.records import Quarantined
from raytune_vlm.sources import SOURCES, Shard
from raytune_vlm.sources.base import RowError
from raytune_vlm.sources.files import find_files, read_image
from raytune_vlm.sources.pdf import document_pages
from raytune_vlm.visible import visible

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
DOCUMENTS = (".pdf", ".tif", ".tiff")
SPLIT = "auto"
"""Of what is quarantined: labels have no split yet."""

Progress = Callable[[int, int], None]
"""Called with the number of files (shards of sources) that are read, and of all."""


@dataclass(frozen=True)
class Page:
    """One or several images that are asked about together."""

    origin: str
    """Where it stands, for messages: `scans/a.pdf:3`."""
    group_id: str
    """What must not be split: the document, the sample's own group."""
    images: tuple[bytes, ...]
    """Encoded, undecoded."""
    scopes: tuple[str, ...] = ("page", "document")
    """Which tasks it is for: pages of a document are no documents, and the other way round."""

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The SHA-256 of each image."""
        return tuple(hashlib.sha256(image).hexdigest() for image in self.images)

    @cached_property
    def page_id(self) -> str:
        """A name made of the images alone: the same images are the same page."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()[:16]


def read_pages(config: LabelConfig, progress: Progress) -> Iterator[Page | Quarantined]:
    """Every page, a document behind its pages, in order; raises DataError where a path is wrong."""
    root = Path(config.root)
    suffixes = (*IMAGES, *DOCUMENTS)
    files = [shard for path in config.files for shard in find_files(path, root, False, suffixes)]
    parts = [
        (source, shard)
        for source in config.sources
        for shard in SOURCES[source.type].list_shards(source, root, config.allow_network)
    ]
    total = len(files) + len(parts)
    for done, shard in enumerate(files, 1):
        yield from _file(config, shard)
        progress(done, total)
    for done, (source, shard) in enumerate(parts, len(files) + 1):
        yield from _samples(config, source, shard)
        progress(done, total)


def _file(config: LabelConfig, shard: Shard) -> Iterator[Page | Quarantined]:
    shown = visible(shard.shown)
    scopes = {task.scope for task in config.tasks}
    first: list[bytes] = []
    try:
        if not shard.path.lower().endswith(DOCUMENTS):
            image = read_image(shard.path, shard, config.image_limits.max_bytes)
            yield Page(shown, hashlib.sha256(image).hexdigest()[:16], (image,))
            return
        for number, group, page in document_pages(shard, config.documents, config.image_limits):
            origin = f"{shown}:{number}"
            if isinstance(page, RowError):
                yield Quarantined(origin, visible(page.message), SPLIT)
            else:
                first.append(page)
                yield Page(origin, group, (page,), ("page",))
            if number >= config.document_pages and "page" not in scopes:
                break
        if first:
            yield Page(shown, group, tuple(first[: config.document_pages]), ("document",))
    except RowError as error:
        yield Quarantined(shown, visible(error.message), SPLIT)


def _samples(config: LabelConfig, source: Source, shard: Shard) -> Iterator[Page | Quarantined]:
    for entry in SOURCES[source.type].read_shard(source, shard, config.image_limits):
        if isinstance(entry, Quarantined):
            yield Quarantined(visible(entry.origin), visible(entry.reason), SPLIT)
        elif not entry.images:
            yield Quarantined(visible(entry.origin), "the sample has no image", SPLIT)
        else:
            yield Page(visible(entry.origin), entry.group_id, tuple(entry.images))
