"""Seeded pictures of small receipts with their truth as JSON.

Kind A is what the base model knows, kind B is the new kind that the demo adapts it to: other
layout (a dark bar with the total on top, the count before the name), other item names, and another
output schema. Pages are rows of made-up words and amounts, which teach the base model to read.
To look at some: `python -m raytune_vlm.demo.receipts FOLDER` writes 8 PNG files of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from raytune_vlm.demo.lines import (
    FONTS,
    WIDTH,
    Glyph,
    Rng,
    choice,
    draw_text,
    fitting_size,
    random_amount,
    random_ink,
    random_word,
    text_width,
)

# Words of at most five letters: a row of twelve characters is as much as 96 pixels can show.
_FOOD = (
    "ALE BEAN BEEF BEET BUN CAKE CHIP COD CORN CRAB DILL EGG FIG HAM HERB ICE JAM KALE LEEK LIME "
    "MEAT MILK MINT NUT OAT OIL PEA PEAR PIE RICE RUM RYE SALT SODA SOUP SOY STEW TEA TUNA YAM"
)
_GOODS = (
    "BOOK BRUSH CARD CLIP COMB CUP DISK FORK GLUE INK KEY LAMP MUG NAIL PAD PEN ROPE RUG SOAP "
    "TAPE TOY VASE WAX YARN"
)
NAMES_A, NAMES_B = tuple(_FOOD.split()), tuple(_GOODS.split())
# One row of a picture: the text at the left, the text at the right, and whether it is a dark bar.
Row = tuple[str, str, bool]


def _items(rng: Rng, names: tuple[str, ...], count: int) -> list[tuple[str, str, int]]:
    """Names (each at most once), counts and prices in cents."""
    chosen: list[str] = []
    while len(chosen) < count:
        name = str(choice(rng, names))
        if name not in chosen:
            chosen.append(name)
    return [(name, str(int(rng.integers(1, 10))), int(rng.integers(50, 1000))) for name in chosen]


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def draw_rows(
    rows: list[Row], rng: Rng, *, ink: int, ground: int, glyphs: list[Glyph] | None = None
) -> Image.Image:
    """The rows one below the other, all in one font that fits the widest row."""
    font = str(choice(rng, FONTS))
    height = int(rng.integers(128, 162))
    border = float(rng.uniform(3, 9))
    pitch = (height - 2 * border) / len(rows)
    inner = WIDTH - 2 * border
    size = min(fitting_size(font, f"{left} {right}", inner) for left, right, _ in rows)
    size = min(size, int(pitch / 1.15), int(rng.integers(21, 28)))
    picture = Image.new("L", (WIDTH, height), ground)
    draw = ImageDraw.Draw(picture)
    pitch = min(pitch, size * float(rng.uniform(1.25, 1.9)))
    top = border + float(rng.random()) * max(0.0, height - 2 * border - pitch * len(rows))
    for index, (left, right, bar) in enumerate(rows):
        middle = top + (index + 0.5) * pitch
        colour = ink
        if bar:
            colour = ground
            draw.rectangle((0, middle - 0.5 * pitch, WIDTH, middle + 0.5 * pitch), fill=ink)
        if left:
            draw_text(draw, (border, middle), left, font=font, size=size, ink=colour, glyphs=glyphs)
        if right:
            x = WIDTH - border - text_width(font, size, right)
            draw_text(draw, (x, middle), right, font=font, size=size, ink=colour, glyphs=glyphs)
    return picture.convert("RGB")


def render_kind_a(
    rng: Rng, *, glyphs: list[Glyph] | None = None
) -> tuple[Image.Image, dict[str, Any]]:
    """A receipt that the base model can parse: `NAME x2   1.20` rows, the sum below."""
    count = int(rng.integers(1, 4))
    items = _items(rng, NAMES_A, count)
    if rng.random() < 0.4:  # made-up names, so that the model reads and does not guess
        items[-1] = (random_word(rng, shortest=3, longest=4), *items[-1][1:])
    rows: list[Row] = [(f"{name} x{qty}", _money(cost), False) for name, qty, cost in items]
    total = _money(sum(cost for *_, cost in items))
    rows.append(("SUM", total, False))
    ink, ground = random_ink(rng, dark_ground=0.05)
    truth = {
        "items": [{"name": name, "qty": qty, "cost": _money(cost)} for name, qty, cost in items],
        "sum": total,
    }
    return draw_rows(rows, rng, ink=ink, ground=ground, glyphs=glyphs), truth


def render_kind_b(
    rng: Rng, *, glyphs: list[Glyph] | None = None
) -> tuple[Image.Image, dict[str, Any]]:
    """A receipt of the new kind: a dark bar with the total, then `2 NAME   1.20` rows."""
    items = _items(rng, NAMES_B, int(rng.integers(2, 4)))
    total = _money(sum(price for *_, price in items))
    rows: list[Row] = [("DUE", total, True)]
    rows += [(f"{count} {name}", _money(price), False) for name, count, price in items]
    ink, ground = random_ink(rng, dark_ground=0.0)
    truth = {
        "menu": [
            {"nm": name, "cnt": count, "price": _money(price)} for name, count, price in items
        ],
        "total": {"total_price": total},
    }
    return draw_rows(rows, rng, ink=ink, ground=ground, glyphs=glyphs), truth


def render_page(rng: Rng, *, glyphs: list[Glyph] | None = None) -> tuple[Image.Image, list[str]]:
    """Rows of made-up words, counts and amounts, and the text of each row."""
    rows: list[Row] = []
    for _ in range(int(rng.integers(1, 5))):
        kind = rng.random()
        word = random_word(rng, shortest=2, longest=5)
        amount = _money(int(rng.integers(0, 3000)))
        if rng.random() < 0.15:
            amount = random_amount(rng)[:6].strip()
        count = str(int(rng.integers(1, 10)))
        bar = bool(rng.random() < 0.12)
        if kind < 0.35:
            rows.append((word, amount, bar))
        elif kind < 0.5:
            rows.append((f"{word} x{count}", amount, bar))
        elif kind < 0.65:
            rows.append((f"{count} {word}", amount, bar))
        elif kind < 0.8:
            rows.append((amount, word, bar))
        elif kind < 0.9:
            rows.append((word, "", bar))
        else:
            rows.append(("", amount, bar))
    ink, ground = random_ink(rng, dark_ground=0.05)
    picture = draw_rows(rows, rng, ink=ink, ground=ground, glyphs=glyphs)
    return picture, [f"{left} {right}".strip() for left, right, _ in rows]


def main(folder: Path, num_each: int = 8) -> None:
    """Writes some receipts of each kind to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, render in (("a", render_kind_a), ("b", render_kind_b), ("page", render_page)):
        for index in range(num_each):
            picture, truth = render(rng)  # type: ignore[operator]
            picture.save(folder / f"{name}-{index}.png")
            print(f"{name}-{index}.png {json.dumps(truth)}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
