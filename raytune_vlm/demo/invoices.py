"""Writes multi-page PDF invoices in four languages and three layouts, with the truth of each page.

    python -m raytune_vlm.demo.invoices FOLDER [--documents 320] [--seed 0]

`documents/invoice-NNNN.pdf`, and `pages.jsonl` as source `pdf` reads it: a row a page with `file`,
`page`, `text`, `language` and `layout`. The first page has number and date, the next ones items
with count and price, the last one net, VAT and total. The answer has the same keys and amounts in
every language; a page in Arabic is written and laid out from right to left. Pages are pictures of
print, as a scanner's are, and small: the model of the demo reads rows of twelve characters.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw

from raytune_vlm.demo.lines import Rng, choice, draw_text, fitting_size, random_ink, text_width
from raytune_vlm.errors import DataError
from raytune_vlm.json_tokens import json2token

NUM_DOCUMENTS = 320
PAGE = (192, 144)
"""Points, and pixels at 72 dots per inch."""
SHARPNESS = 3
"""Pixels of the pictures in a PDF for each point."""
VAT_PERCENT = (5, 7, 10, 19, 20)

# Alike on every machine: these come with matplotlib, and have the letters of all the languages.
_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")

Line = tuple[str, str, bool]
"""What stands where a line begins, what stands where it ends, and whether it is a dark bar."""


@dataclass(frozen=True)
class Language:
    """The words of an invoice, and how numbers are written."""

    number: str
    date: str
    net: str
    vat: str
    total: str
    items: tuple[str, ...]
    comma: str = ","
    between: str = "."
    """What stands between day, month and year."""
    right_to_left: bool = False


LANGUAGES = {
    "en": Language(
        "NO", "DATE", "NET", "VAT", "TOTAL", ("BOOK", "BRUSH", "LAMP", "SOAP", "ROPE", "VASE"),
        comma=".", between="/",
    ),
    "de": Language(
        "NR", "DATUM", "NETTO", "MWST", "SUMME", ("BUCH", "TÜR", "LAMPE", "SEIFE", "SEIL", "KÄSE"),
    ),
    "fr": Language(
        "NO", "DATE", "HT", "TVA", "TTC", ("LIVRE", "CLÉ", "LAMPE", "SAVON", "CORDE", "THÉ"),
        between="/",
    ),
    "ar": Language(
        "رقم", "تاريخ", "صافي", "ضريبة", "مجموع", ("كتاب", "قلم", "مصباح", "صابون", "حبل", "شاي"),
        comma=".", between="/", right_to_left=True,
    ),
}  # fmt: skip

LAYOUTS = ("plain", "bars", "stacked")
"""`bars`: the first line is light on dark; `stacked`: a label stands above its value."""


@dataclass(frozen=True)
class Page:
    """A page of a document, and what is asked of it."""

    picture: Image.Image
    truth: dict[str, Any]


def write_invoices(folder: Path, *, seed: int = 0, num_documents: int = NUM_DOCUMENTS) -> None:
    """Write the documents and their table, whole or not at all.

    Raises
    ------
    DataError
        If the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (unfinished / "documents").mkdir()
        with (unfinished / "pages.jsonl").open("w", encoding="utf-8") as table:
            for number in range(num_documents):
                for row in _write_document(
                    unfinished, np.random.default_rng([seed, number]), number
                ):
                    table.write(json.dumps(row) + "\n")
        unfinished.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_document(folder: Path, rng: Rng, number: int) -> Iterator[dict[str, Any]]:
    name, layout = list(LANGUAGES)[number % len(LANGUAGES)], str(choice(rng, LAYOUTS))
    pages = invoice(rng, LANGUAGES[name], layout)
    file = f"documents/invoice-{number:04d}.pdf"
    first, *others = [page.picture for page in pages]
    then = time.gmtime(0)  # a document is the same whenever it is written
    first.save(
        folder / file,
        format="PDF",
        save_all=True,
        append_images=others,
        resolution=72 * SHARPNESS,
        creationDate=then,
        modDate=then,
    )
    for place, page in enumerate(pages, start=1):
        text = json2token(page.truth)
        yield {"file": file, "page": place, "text": text, "language": name, "layout": layout}


def invoice(rng: Rng, language: Language, layout: str) -> list[Page]:
    """The pages of an invoice: three or four."""
    draw = _printer(rng, language, layout)
    number = str(int(rng.integers(1000, 100_000)))
    day = [int(rng.integers(1, 29)), int(rng.integers(1, 13)), int(rng.integers(10, 27))]
    date = [f"{part:02d}" for part in day]
    head: list[Line] = [(language.number, number, False)]
    head += [(language.date, "", False), ("", language.between.join(date), False)]
    pages = [Page(draw(head), {"no": number, "date": ".".join(date)})]
    prices: list[int] = []
    for _ in range(int(rng.integers(1, 3))):
        items = [_item(rng, language) for _ in range(int(rng.integers(2, 4)))]
        prices += [cents for *_, cents in items]
        lines = [
            (_beside(language, count, name), _money(cents, language), False)
            for name, count, cents in items
        ]
        menu = [{"cnt": count, "price": _money(cents)} for _, count, cents in items]
        pages.append(Page(draw(lines), {"menu": menu}))
    net = sum(prices)
    vat = round(net * int(choice(rng, VAT_PERCENT)) / 100)
    sums = {"net": net, "vat": vat, "total": net + vat}
    foot = [(getattr(language, key), _money(c, language), False) for key, c in sums.items()]
    pages.append(Page(draw(foot), {key: _money(cents) for key, cents in sums.items()}))
    return pages


def _item(rng: Rng, language: Language) -> tuple[str, str, int]:
    """Name, count and price in cents."""
    count = str(int(rng.integers(1, 10)))
    return str(choice(rng, language.items)), count, int(rng.integers(50, 1000))


def _money(cents: int, language: Language | None = None) -> str:
    comma = "." if language is None else language.comma
    return f"{cents // 100}{comma}{cents % 100:02d}"


def _beside(language: Language, count: str, name: str) -> str:
    """Count and name in the order in which they are read, from left to right."""
    return f"{shaped(name)} {count}" if language.right_to_left else f"{count} {name}"


def _printer(rng: Rng, language: Language, layout: str) -> Callable[[list[Line]], Image.Image]:
    """Prints the pages of one document, alike in font, border and shade."""
    font, border = str(choice(rng, _FONTS)), float(rng.uniform(4, 10))
    ink, ground = random_ink(rng, dark_ground=0.0)

    def draw(lines: list[Line]) -> Image.Image:
        if layout == "stacked":
            lines = [half for line in lines for half in _stacked(line)]
        if layout == "bars":
            lines = [(*lines[0][:2], True), *lines[1:]]
        return _print(lines, language, font=font, border=border, ink=ink, ground=ground)

    return draw


def _stacked(line: Line) -> list[Line]:
    """A label, and its value in a line of its own; lines with one of the two stay."""
    begin, end, bar = line
    whole = not begin or not end or begin[0].isdigit() or begin[-1].isdigit()
    return [line] if whole else [(begin, "", bar), ("", end, bar)]


def _print(
    lines: list[Line], language: Language, *, font: str, border: float, ink: int, ground: int
) -> Image.Image:
    width, height, border = PAGE[0] * SHARPNESS, PAGE[1] * SHARPNESS, border * SHARPNESS
    picture = Image.new("L", (width, height), ground)
    draw = ImageDraw.Draw(picture)
    pitch = (height - 2 * border) / len(lines)
    texts = [(shaped(begin), end, bar) for begin, end, bar in lines]
    size = min(fitting_size(font, f"{a} {b}", width - 2 * border) for a, b, _ in texts)
    size = min(size, int(pitch / 1.25), 26 * SHARPNESS)
    for index, (begin, end, bar) in enumerate(texts):
        middle = border + (index + 0.5) * pitch
        if bar:
            draw.rectangle((0, middle - 0.5 * pitch, width, middle + 0.5 * pitch), fill=ink)
        left, right = (end, begin) if language.right_to_left else (begin, end)
        for text, x in ((left, border), (right, width - border - text_width(font, size, right))):
            if text:
                place, colour = (x, middle), ground if bar else ink
                draw_text(draw, place, text, font=font, size=size, ink=colour)
    return picture


@cache
def _forms() -> dict[str, dict[str, str]]:
    """Arabic letter -> the forms that Unicode has of it: isolated, final, initial, medial."""
    found: dict[str, dict[str, str]] = {}
    for code in range(0xFE80, 0xFEF5):  # Arabic Presentation Forms-B, letters
        form, _, letter = unicodedata.decomposition(chr(code)).partition(" ")
        found.setdefault(chr(int(letter, 16)), {})[form.strip("<>")] = chr(code)
    return found


def shaped(text: str) -> str:
    """Arabic words as their letters stand joined, from left to right; other text as it is.

    A letter joins the one before it if that has an initial form, as most do. Pillow would do it
    with libraries that not every machine has, and pictures would differ.
    """
    forms = _forms()
    if not any(letter in forms for letter in text):
        return text
    drawn = []
    for index, letter in enumerate(text):
        if letter not in forms:
            drawn.append(letter)
            continue
        before = forms.get(text[index - 1], {}) if index else {}
        after = text[index + 1] if index + 1 < len(text) else ""
        back, on = "initial" in before, "initial" in forms[letter] and after in forms
        form = {(True, True): "medial", (True, False): "final", (False, True): "initial"}
        drawn.append(forms[letter][form.get((back, on), "isolated")])
    return "".join(reversed(drawn))


@click.command()
@click.option("--documents", type=click.IntRange(min=1), default=NUM_DOCUMENTS, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Another one gives other documents.")
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path, documents: int, seed: int) -> None:
    """Write invoices into a new FOLDER."""
    write_invoices(folder, seed=seed, num_documents=documents)


if __name__ == "__main__":
    main()
