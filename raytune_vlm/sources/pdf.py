"""`pdf`: pages of documents, PDF and multi-page TIFF, with what is asked of them.

Each row of a table (JSON lines, Parquet, ...) names a `file`, a `page` or a list of pages (from 1),
and either the `text` that the model shall answer or `messages`. Where the messages do not say where
the pages stand (`<image>`, or parts of type `image`), they stand before the user's first words. All
rows of one file have its content's hash as `group_id`, so that no document is divided; a column
`group_id` overrules it. Rows of one file should follow each other: one document is open at a time.

A PDF is rendered by PDFium (pypdfium2), which runs no script of a document. Before a page is
rendered, its size and those of the pictures in it are held against `data.image_limits.max_pixels`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import DocumentPages, PdfSource
from raytune_vlm.errors import DataError
from raytune_vlm.images import ImageError, encode_png, tiff_length, tiff_page
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, RowError, Shard, check_counts, shorten
from raytune_vlm.sources.files import read_image
from raytune_vlm.sources.messages import FROM_COLUMN, parse_turns
from raytune_vlm.sources.prompt_completion import show_first
from raytune_vlm.sources.rows import Row, list_table_shards, read_table
from raytune_vlm.sources.scans import cleaned

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PDF_START = b"%PDF-"
PDF_START_WITHIN = 1024
"""Bytes in which a reader looks for the beginning (ISO 32000-1, annex H.3.4.1)."""
POINTS_PER_INCH = 72


def list_shards(config: PdfSource, root: Path, allow_network: bool) -> list[Shard]:
    """The table's shards; raises DataError as for every table, or without pypdfium2."""
    if find_spec("pypdfium2") is None:
        raise DataError("data.sources: pdf needs pypdfium2: pip install 'raytune-vlm[documents]'")
    details = f"pypdfium2 {version('pypdfium2')}"
    shards = list_table_shards(config, root, allow_network)
    return [replace(shard, details=details) for shard in shards]


def read_shard(
    config: PdfSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The rows of a shard, with their pages as images."""
    columns = (
        config.file_column,
        config.page_column,
        config.answer_column,
        config.messages_column,
    )
    documents = _Documents(config, shard, limits)
    return read_table(config, shard, limits, columns, partial(_convert, config, documents))


def document_pages(
    shard: Shard, config: DocumentPages, limits: ImageLimits
) -> Iterator[tuple[int, str, bytes | RowError]]:
    """Number, group and PNG of every page of the document that a shard is, or why it has none.

    Raises RowError where the document cannot be opened.
    """
    document = _Documents(config, shard, limits).open(shard.path)
    for number in range(1, document.num_pages + 1):
        try:
            page = cleaned(document.page(number), config)
            yield number, document.group_id, encode_png(page)
        except RowError as error:
            yield number, document.group_id, error


def _convert(config: PdfSource, documents: _Documents, row: Row) -> Sample:
    numbers = _numbers(row, config.page_column)
    messages = _messages(config, row, len(numbers))
    document = documents.open(row.text(config.file_column))
    pages = [encode_png(cleaned(document.page(number), config)) for number in numbers]
    return row.sample(messages, pages, group_id=document.group_id)


def _numbers(row: Row, name: str) -> list[int]:
    """The pages of a row, in its order."""
    value = row.column(name)
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise RowError(f"column '{name}' must hold page numbers from 1, not {shorten(number)}")
    if not numbers:
        raise RowError(f"column '{name}' holds no page")
    return numbers


def _messages(config: PdfSource, row: Row, num_pages: int) -> list[dict[str, Any]]:
    names = (config.answer_column, config.messages_column)
    given = [name for name in names if row.raw.values.get(name) is not None]
    if len(given) != 1:
        both = " and ".join(f"'{name}'" for name in names)
        raise RowError(f"one of the columns {both} must be given, not {len(given)}")
    if given == [config.answer_column]:
        turns = [
            {"role": "user", "content": [{"type": "text", "text": config.instruction}]},
            {"role": "assistant", "content": [{"type": "text", "text": row.text(given[0])}]},
        ]
        show_first(turns, num_pages)
        return turns
    turns, images = parse_turns(row.turns(config.messages_column))
    if any(image is not FROM_COLUMN for image in images):
        raise RowError("the messages name images of their own: only the pages are shown")
    if images:
        check_counts(len(images), num_pages, " (pages)")
    else:
        show_first(turns, num_pages)
    return turns


class _Document(Protocol):
    """A document whose pages can be had; raises RowError."""

    group_id: str
    num_pages: int

    def page(self, number: int) -> Image.Image: ...


class _Documents:
    """The document that was asked for last, or what is wrong with it."""

    def __init__(self, config: DocumentPages, shard: Shard, limits: ImageLimits) -> None:
        self._config, self._shard, self._limits = config, shard, limits
        self._name: str | None = None
        self._opened: _Document | RowError

    def open(self, name: str) -> _Document:
        if name != self._name:
            try:
                self._opened = self._open(name)
            except RowError as error:
                self._opened = error
            self._name = name
        if isinstance(self._opened, RowError):
            raise RowError(self._opened.message)
        return self._opened

    def _open(self, name: str) -> _Document:
        data = read_image(name, self._shard, self._config.max_bytes, what="document")
        if data.startswith(TIFF_STARTS):
            return _Tiff(data, self._config, self._limits)
        if PDF_START in data[:PDF_START_WITHIN]:
            return _Pdf(data, self._config, self._limits)
        raise RowError(f"the document is neither a PDF nor a TIFF: {shorten(name)}")


class _Tiff:
    """A TIFF, a frame a page."""

    def __init__(self, data: bytes, config: DocumentPages, limits: ImageLimits) -> None:
        self.group_id = _group_of(data)
        self._data, self._config, self._limits = data, config, limits
        try:
            self.num_pages = tiff_length(data, max_pages=config.max_pages)
        except ImageError as error:
            raise RowError(error.message) from error

    def page(self, number: int) -> Image.Image:
        try:
            image = tiff_page(self._data, number, self._limits)
        except ImageError as error:
            raise RowError(error.message) from error
        share = math.sqrt(self._config.max_pixels / (image.width * image.height))
        if share >= 1:
            return image
        size = (max(1, int(image.width * share)), max(1, int(image.height * share)))
        return image.resize(size, Image.Resampling.LANCZOS)


class _Pdf:
    """A PDF, opened by PDFium with its form fields, so that what was filled in is seen."""

    def __init__(self, data: bytes, config: DocumentPages, limits: ImageLimits) -> None:
        import pypdfium2
        from pypdfium2 import raw

        self.group_id = _group_of(data)
        self._config, self._limits = config, limits
        try:
            self._pdf = pypdfium2.PdfDocument(data)
            self._pdf.init_forms()
        except pypdfium2.PdfiumError as error:
            if getattr(error, "err_code", None) == raw.FPDF_ERR_PASSWORD:
                raise RowError("the PDF is encrypted: it needs a password") from error
            raise RowError(f"the PDF cannot be opened: {shorten(error)}") from error
        self.num_pages = len(self._pdf)
        if self.num_pages > config.max_pages:
            raise RowError(f"the PDF has {self.num_pages} pages, the limit is {config.max_pages}")

    def page(self, number: int) -> Image.Image:
        """The page at `dpi`, or at fewer where it would have more than `max_pixels`."""
        import pypdfium2

        if number > self.num_pages:
            raise RowError(f"there is no page {number}: the PDF has {self.num_pages}")
        try:
            width, height = self._pdf.get_page_size(number - 1)
            scale = self._config.dpi / POINTS_PER_INCH
            what = f"page {number} at {self._config.dpi} dpi"
            self._check(math.ceil(width * scale), math.ceil(height * scale), what)
            page = self._pdf[number - 1]
            self._check_pictures(page, number)
            scale = min(scale, math.sqrt(self._config.max_pixels / max(width * height, 1.0)))
            image: Image.Image = page.render(scale=scale).to_pil().convert("RGB")
            page.close()
        except pypdfium2.PdfiumError as error:
            raise RowError(f"page {number} cannot be rendered: {shorten(error)}") from error
        return image

    def _check_pictures(self, page: Any, number: int) -> None:
        from pypdfium2 import raw

        for picture in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]):
            width, height = picture.get_px_size()
            self._check(width, height, f"a picture in page {number}")

    def _check(self, width: int, height: int, what: str) -> None:
        if width * height > self._limits.max_pixels:
            raise RowError(
                f"{what} has {width} x {height} pixels, the limit is {self._limits.max_pixels}"
            )


def _group_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


READER = Reader(list_shards, read_shard)
