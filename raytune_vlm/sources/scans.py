"""What a scanner did to a page, undone where it is asked for: little contrast, lines that slope."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from raytune_vlm.config.sources import DocumentPages

MOST_DEGREES = 5.0
"""A page is taken to slope no more; a larger angle is how it was meant, or a page on its side."""
COARSE, FINE = 0.5, 0.1
"""Steps in degrees of the two searches for the angle."""
SEARCH_SIDE = 800
"""Pixels of the longer side of the copy that is searched."""
CLEARLY = 1.2
"""How many times sharper rows have to be at an angle than as they are: noise turns nothing."""
CUT_PERCENT = 1.0
"""Lightest and darkest pixels that contrast is not stretched for: specks and edges."""


def cleaned(page: Image.Image, config: DocumentPages) -> Image.Image:
    """A page with its lines level and its contrast stretched, as far as `config` asks for it."""
    if config.deskew:
        page = deskewed(page)
    if config.autocontrast:
        page = ImageOps.autocontrast(page, cutoff=CUT_PERCENT, preserve_tone=True)
    return page


def deskewed(page: Image.Image) -> Image.Image:
    """The page turned by `-slope(page)`, its size kept; corners are filled with its ground."""
    degrees = slope(page)
    if degrees == 0:
        return page
    ground = tuple(int(np.median(np.asarray(band))) for band in page.split())
    return page.rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=ground)


def slope(page: Image.Image) -> float:
    """Degrees by which lines rise to the right, in steps of `FINE`; 0 where no angle is better.

    The angle at which the sums of ink over rows differ most from row to row: over lines of text
    they do when the rows run along them (projection profile; Postl 1986, Detection of linear
    oblique structures and skew scan in digitized documents, ICPR).
    """
    small = page.convert("L")
    small.thumbnail((SEARCH_SIDE, SEARCH_SIDE))
    ground = int(np.median(np.asarray(small)))

    def sharpness(degrees: float) -> float:
        turned = small.rotate(-degrees, Image.Resampling.BILINEAR, fillcolor=ground)
        rows = np.asarray(turned, dtype=np.float64).sum(axis=1)
        return float((np.diff(rows) ** 2).sum())

    count = round(MOST_DEGREES / COARSE)
    near = max((COARSE * step for step in range(-count, count + 1)), key=sharpness)
    steps = round(COARSE / FINE)
    best = max((near + FINE * step for step in range(-steps, steps + 1)), key=sharpness)
    return round(best, 1) if sharpness(best) > CLEARLY * sharpness(0.0) else 0.0
