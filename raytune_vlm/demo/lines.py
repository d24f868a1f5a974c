"""Seeded pictures of single text lines: amounts, dates and words, as on receipts.

A tiny model that has learned to read these clean prints is the start for reading real scans.
Real scans are placed in the same way by `raytune_vlm.images.on_canvas`.
To look at some: `python -m raytune_vlm.demo.lines FOLDER` writes 24 PNG files.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WIDTH = 192  # every picture is this wide; the processor then squeezes it to a square
ASPECT = 0.75  # the height of a canvas over its width
MAX_CHARACTERS = 12
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
MARKS = ".,/:-$@%#*()&+"
ALPHABET = LETTERS + DIGITS + MARKS + "x "
PILLOW_FONT = "pillow-default"
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "STIXGeneralBol.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
    PILLOW_FONT,
)
Rng = np.random.Generator
Font = Any  # ImageFont.FreeTypeFont, or Pillow's own default font


@dataclass(frozen=True)
class Glyph:
    """Where one character stands, in pixels of the picture."""

    character: str
    left: float
    top: float
    right: float
    bottom: float


@functools.cache
def font_folder() -> Path:
    """The folder of the fonts that ship with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@functools.lru_cache(maxsize=1024)
def load_font(name: str, size: int) -> Font:
    """A font of `FONTS` at a size in pixels."""
    if name == PILLOW_FONT:
        return ImageFont.load_default(size)
    # The basic layout has no kerning, so that character positions are sums of advances.
    return ImageFont.truetype(font_folder() / name, size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1 << 16)
def _advance(name: str, size: int, character: str) -> float:
    return float(load_font(name, size).getlength(character))


def text_width(name: str, size: int, text: str) -> float:
    """The width of a text in pixels."""
    return sum(_advance(name, size, character) for character in text)


def fitting_size(name: str, text: str, width: float) -> int:
    """The largest font size at which the text is at most `width` wide."""
    return max(6, int(40 * width / max(text_width(name, 40, text), 1e-6)))


def draw_text(
    draw: ImageDraw.ImageDraw,
    position: tuple[float, float],
    text: str,
    *,
    font: str,
    size: int,
    ink: int,
    glyphs: list[Glyph] | None = None,
) -> None:
    """Draws a text with its left middle at `position` and notes where each character stands."""
    left, middle = round(position[0]), round(position[1])
    draw.text((left, middle), text, fill=ink, font=load_font(font, size), anchor="lm")
    if glyphs is None:
        return
    x = float(left)
    for character in text:
        right = x + _advance(font, size, character)
        if character != " ":
            glyphs.append(Glyph(character, x, middle - 0.5 * size, right, middle + 0.5 * size))
        x = right


def choice(rng: Rng, options: Any) -> Any:
    """One of the options (numpy's own `choice` turns strings into numpy strings and is slow)."""
    return options[int(rng.integers(len(options)))]


def random_amount(rng: Rng) -> str:
    """An amount of money as receipts write it."""
    whole = int(rng.integers(0, 10 ** int(rng.integers(1, 5))))
    cents = int(rng.integers(0, 100))
    if rng.random() < 0.4:
        cents = int(choice(rng, (0, 0, 50, 90, 10 * int(rng.integers(10)))))
    amount = f"{whole:,}.{cents:02d}" if rng.random() < 0.6 else f"{whole}.{cents:02d}"
    style = rng.random()
    if style < 0.62:
        return amount
    front = choice(rng, ("RM", "RM ", "$", "-", "@", "#", "*", "(", "1 X ", "3 X ", "+", "&"))
    if style < 0.88:
        return f"({amount})" if front == "(" else front + amount
    return amount + choice(rng, (" S", " SR", " Z", "%", " ZRL", "x2", "*", "-"))


def random_date(rng: Rng) -> str:
    """A date or a time of the day."""
    day, month = int(rng.integers(1, 32)), int(rng.integers(1, 13))
    year = int(rng.integers(2010, 2027))
    mark = choice(rng, "/-/.")
    time = f"{int(rng.integers(24)):02d}:{int(rng.integers(60)):02d}"
    styles = (
        f"{day:02d}{mark}{month:02d}{mark}{year}",
        f"{day:02d}{mark}{month:02d}{mark}{year % 100:02d}",
        f"{year}{mark}{month:02d}{mark}{day:02d}",
        time,
        f"{time} {choice(rng, ('AM', 'PM'))}",
        f"{time}:{int(rng.integers(60)):02d}",
    )
    return str(choice(rng, styles))


def random_word(rng: Rng, *, shortest: int = 2, longest: int = 6) -> str:
    """A made-up word; half of them can be pronounced."""
    length = int(rng.integers(shortest, longest + 1))
    if rng.random() < 0.5:
        return "".join(choice(rng, LETTERS) for _ in range(length))
    vowel = int(rng.integers(2))
    return "".join(
        choice(rng, "AEIOU" if (i + vowel) % 2 else "BCDFGHJKLMNPRSTVWZ") for i in range(length)
    )


def random_line(rng: Rng) -> str:
    """The text of one line, at most `MAX_CHARACTERS` long."""
    kind = rng.random()
    if kind < 0.45:
        text = random_amount(rng)
    elif kind < 0.62:
        text = random_date(rng)
    elif kind < 0.82:
        text = random_word(rng, longest=8)
    elif kind < 0.92:
        text = f"{random_word(rng, longest=5)} {random_amount(rng)}"
    else:
        text = "".join(choice(rng, ALPHABET) for _ in range(int(rng.integers(2, 9))))
    return " ".join(text[:MAX_CHARACTERS].split()) or "0.00"


def random_ink(rng: Rng, *, dark_ground: float = 0.12) -> tuple[int, int]:
    """A grey for the ink and one for the ground; sometimes light print on a dark ground."""
    ink, ground = int(rng.integers(0, 90)), int(rng.integers(215, 256))
    return (ground, ink) if rng.random() < dark_ground else (ink, ground)


def render_line(text: str, rng: Rng, *, glyphs: list[Glyph] | None = None) -> Image.Image:
    """A clean print of one line with jitter in font, size, place, shade and sharpness."""
    font = str(choice(rng, FONTS))
    height = int(rng.integers(106, 186))
    ink, ground = random_ink(rng)
    fit = fitting_size(font, text, WIDTH * float(rng.uniform(0.86, 0.97)))
    size = min(fit, int(rng.integers(26, 48)))
    picture = Image.new("L", (WIDTH, height), ground)
    free = WIDTH - text_width(font, size, text)
    left = max(1.0, free * (0.5 if rng.random() < 0.5 else float(rng.random())))
    middle = height * float(rng.uniform(0.4, 0.6))
    drawn = ImageDraw.Draw(picture)
    draw_text(drawn, (left, middle), text, font=font, size=size, ink=ink, glyphs=glyphs)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.3))))
    return picture.convert("RGB")


def main(folder: Path, num_lines: int = 24) -> None:
    """Writes some lines to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(num_lines):
        text = random_line(rng)
        render_line(text, rng).save(folder / f"line-{index:02d}.png")
        print(f"line-{index:02d}.png {text}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
