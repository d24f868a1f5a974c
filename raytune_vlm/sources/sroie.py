"""`sroie`: text lines cut out of scanned receipts (ICDAR 2019 SROIE).

The folder holds `img/NNN.jpg` and `box/NNN.csv` (or `.txt`), one text line a row:
`x1,y1,x2,y2,x3,y3,x4,y4,transcript`, where the transcript may hold commas. Each line that is kept
is a sample: the upright rectangle around the four corners, with a margin, cut out of the scan.
`key/` is not needed. Kept by default: lines that are nothing but an amount (`9.00`, `-0.03`,
`RM1,234.50`, `$9.90 SR`) or a date, with or without a time (`25/12/2018 8:13:39 PM`).

A line that is not UTF-8 is quarantined when it would be kept: its real encoding is not known, and
a wrong transcript would be a wrong label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import SroieSource
from raytune_vlm.errors import DataError, did_you_mean
from raytune_vlm.images import ImageError, decode, encode_png, on_canvas
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import (
    Reader,
    RowError,
    Shard,
    attempt,
    make_sample,
    number_shards,
    question,
    shorten,
)
from raytune_vlm.sources.files import find_folder, read_image, resolve_root, show

RECEIPTS_PER_SHARD = 8
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
BOX_SUFFIXES = (".csv", ".txt")

_AMOUNT = re.compile(
    r"[-+(]?\s*(?:(?:RM|MYR|\$|£|€)\s*)?-?"  # sign, currency
    r"(?:\d{1,3}(?:,\d{3})+|\d*)\.\d{2}"  # 1,234.50 or 1234.50 or .50
    r"\s*(?:RM|MYR)?[-)]?(?:\s*(?:SR|ZRL|ZR|S|Z|T|E|\*))?",  # currency, sign, tax code
    re.IGNORECASE | re.ASCII,
)
_MONTH = r"(?:JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)[A-Z]*"
_DATE = re.compile(
    r"(?:\d{1,2}([-/.])\d{1,2}\1(?:\d{4}|\d{2})|\d{4}([-/.])\d{1,2}\2\d{1,2}"
    rf"|\d{{1,2}}[-/. ]?{_MONTH}[-/., ]*(?:\d{{4}}|\d{{2}})"
    rf"|{_MONTH}\.? ?\d{{1,2}},? ?\d{{4}})"
    r"(?:\s+\d{1,2}:\d{2}(?::\d{2})?\s*(?:AM|PM)?)?",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True)
class _Line:
    """A line of a box file that is kept, or (`reason`) what is wrong with it."""

    number: int
    text: str = ""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    reason: str = ""


def list_shards(config: SroieSource, root: Path, allow_network: bool) -> list[Shard]:
    """The receipts in groups of eight.

    Raises DataError where the folder, its `img` or its `box` is missing, or it holds no receipt.
    """
    folder = find_folder(config.path, root)
    names = [entry.name for entry in folder.iterdir()]
    for needed in ("img", "box"):
        if not (folder / needed).is_dir():
            raise DataError(f"no folder '{needed}' in {folder}{did_you_mean(needed, names)}")
    stems = sorted(_stems(folder / "img", IMAGE_SUFFIXES) | _stems(folder / "box", BOX_SUFFIXES))
    if not stems:
        raise DataError(f"source folder {folder} holds no receipt in img/ and box/")
    shown = show(folder, resolve_root(root))
    folders = tuple(dict.fromkeys((str(folder.resolve()), str(folder))))
    shards = [
        Shard(
            path=str(folder),
            index=0,
            shown="" if shown == "." else f"{shown}/",
            folders=folders,
            members=tuple(stems[start : start + RECEIPTS_PER_SHARD]),
        )
        for start in range(0, len(stems), RECEIPTS_PER_SHARD)
    ]
    return number_shards(
        shards,
        config.max_samples,
        lambda shard, most: sum(
            1 for stem in shard.members for _ in islice(_kept_lines(config, shard, stem), most)
        ),
    )


def read_shard(
    config: SroieSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The kept lines of the shard's receipts, each cut out of its scan."""
    return islice(_read_receipts(config, shard, limits), shard.limit)


def _read_receipts(
    config: SroieSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    for stem in shard.members:
        scan: Image.Image | str | None = None
        for line in _kept_lines(config, shard, stem):
            origin = _origin(shard, stem, line)
            if line.reason:
                yield Quarantined(origin, line.reason, config.split)
                continue
            scan = _open_scan(shard, stem, limits) if scan is None else scan
            if isinstance(scan, str):
                yield Quarantined(origin, scan, config.split)
            else:
                make = partial(_cut_out, config, scan, line, stem, origin)
                yield attempt(origin, config.split, make)


def _cut_out(config: SroieSource, scan: Image.Image, line: _Line, stem: str, origin: str) -> Sample:
    crop = scan.crop(crop_box(line.box, scan.size, config.margin))
    if config.canvas is not None:
        crop = on_canvas(crop, *config.canvas)
    return make_sample(
        origin=origin,
        messages=question(config.instruction, line.text),
        images=[encode_png(crop)],
        group_id=stem,
    )


def crop_box(
    box: tuple[int, int, int, int], size: tuple[int, int], margin: float
) -> tuple[int, int, int, int]:
    """The box clipped to the image, with `margin` x its height around it, clipped again.

    Raises RowError where less than 2 x 2 pixels of the box itself lie inside the image.
    """
    width, height = size
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[2], width), min(box[3], height)
    if right - left < 2 or bottom - top < 2:
        raise RowError(f"degenerate box: {box} in an image of {width} x {height} pixels")
    border = margin * (bottom - top)
    return (
        max(math.floor(left - border), 0),
        max(math.floor(top - border), 0),
        min(math.ceil(right + border), width),
        min(math.ceil(bottom + border), height),
    )


def _kept_lines(config: SroieSource, shard: Shard, stem: str) -> Iterator[_Line]:
    """The lines of a box file that the config keeps, and those that cannot be understood."""
    folder = Path(shard.path)
    file = _with_suffix(folder / "box", stem, BOX_SUFFIXES)
    if file is None:
        yield _Line(0, reason="the scan has no box file")
        return
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            yield _Line(0, reason="the box file is a link out of its folder")
            return
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        yield _Line(0, reason=f"unreadable box file: {error.strerror}")
        return
    for number, raw in enumerate(lines, 1):
        if raw.strip() and (line := _parse(config, number, raw)) is not None:
            yield line


def _parse(config: SroieSource, number: int, raw: bytes) -> _Line | None:
    """The line where it is kept, None where it is not; a malformed one counts as kept."""
    fields = raw.split(b",", 8)
    try:
        corners = [round(float(field)) for field in fields[:8]]
    except (ValueError, OverflowError):
        corners = []
    if len(fields) < 9 or len(corners) < 8:
        text = raw.decode("utf-8", "replace")
        return _Line(number, reason=f"malformed box line (8 numbers and a text): {shorten(text)}")
    try:
        text, reason = fields[8].decode("utf-8").strip(), ""
    except UnicodeDecodeError:
        text, reason = fields[8].decode("latin-1").strip(), "the transcript is not UTF-8"
    if len(text) > config.max_characters:
        return None
    if config.keep == "amounts_and_dates" and not (
        _AMOUNT.fullmatch(text) or _DATE.fullmatch(text)
    ):
        return None
    across, down = corners[::2], corners[1::2]
    return _Line(number, text, (min(across), min(down), max(across), max(down)), reason)


def _open_scan(shard: Shard, stem: str, limits: ImageLimits) -> Image.Image | str:
    """The decoded scan, or why there is none."""
    file = _with_suffix(Path(shard.path) / "img", stem, IMAGE_SUFFIXES)
    if file is None:
        return f"image not found: img/{stem}.jpg"
    try:
        return decode(read_image(f"img/{file.name}", shard, limits.max_bytes), limits)
    except (ImageError, RowError) as error:
        return error.message


def _origin(shard: Shard, stem: str, line: _Line) -> str:
    folder = Path(shard.path)
    file = _with_suffix(folder / "box", stem, BOX_SUFFIXES)
    if file is None:
        scan = _with_suffix(folder / "img", stem, IMAGE_SUFFIXES)
        return f"{shard.shown}img/{scan.name if scan else stem}"
    place = f":{line.number}" if line.number else ""
    return f"{shard.shown}box/{file.name}{place}"


def _stems(folder: Path, suffixes: tuple[str, ...]) -> set[str]:
    return {
        file.stem
        for file in folder.iterdir()
        if file.suffix.lower() in suffixes and not file.name.startswith(".")
    }


def _with_suffix(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    """The file of a receipt, whatever the case of its suffix."""
    names = (f"{stem}{variant}" for suffix in suffixes for variant in (suffix, suffix.upper()))
    return next((folder / name for name in names if (folder / name).is_file()), None)


READER = Reader(list_shards, read_shard)
