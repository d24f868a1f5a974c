"""Pages of PDF and TIFF documents: rendered within limits, never divided, refused with a reason."""

from __future__ import annotations

import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_sources import LIMITS, Sample, config_of, lines, read, reasons, shards_of

from raytune_vlm.config.data import ImageLimits, SplitConfig
from raytune_vlm.images import decode
from raytune_vlm.prepare.shard import split_of
from raytune_vlm.sources import SOURCES, pdf, scans
from raytune_vlm.sources.files import read_image

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def pages(file: Path, *colours: tuple[int, int, int], size: tuple[int, int] = (72, 36)) -> None:
    first, *rest = [Image.new("RGB", size, colour) for colour in colours]
    options: dict[str, Any] = {"resolution": 72} if file.suffix == ".pdf" else {}
    first.save(file, save_all=True, append_images=rest, **options)


def raw_pdf(file: Path, page: str, *objects: str, trailer: str = "") -> None:
    """A PDF of one page, written by hand: what no writer writes."""
    body = ["<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[3 0 R]/Count 1>>"]
    text, places = "%PDF-1.4\n", []
    for number, content in enumerate([*body, f"<</Type/Page/Parent 2 0 R{page}>>", *objects], 1):
        places.append(len(text))
        text += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(places) + 1
    text += f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<</Size {size}/Root 1 0 R"
    file.write_bytes(f"{text}{trailer}>>\nstartxref\n{text.index('xref')}\n%%EOF\n".encode())


def row(file: str, page: Any = 1, **columns: Any) -> dict[str, Any]:
    return {"file": file, "page": page, **(columns or {"text": "a"})}


def found(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Any]:
    return read("pdf", lines(folder / "rows.jsonl", *rows), folder, **options)


def colours(sample: Any) -> list[tuple[int, ...]]:
    """The colour in the middle of each picture, JPEG's errors rounded away."""
    assert isinstance(sample, Sample), sample
    shown = [np.asarray(decode(image, LIMITS)) for image in sample.images]
    return [tuple(int(round(v, -2)) for v in p[p.shape[0] // 2, p.shape[1] // 2]) for p in shown]


@pytest.mark.parametrize("name", ["a.pdf", "a.tiff"])
def test_pages_are_shown_where_the_row_says(name, tmp_path):
    pages(tmp_path / name, *COLOURS)
    asked = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<image>, then <image>?"},
        {"role": "assistant", "content": "yes"},
    ]
    plain = [asked[0], {"role": "user", "content": "what?"}, asked[2]]
    one, placed, before = found(
        tmp_path,
        row(name, 2),
        row(name, [3, 1], messages=asked),
        row(name, [1, 2], messages=plain, group_id="mine"),
        instruction="read",
    )
    assert colours(one) == [COLOURS[1]]
    assert [part.get("text") for part in one.messages[0]["content"]] == [None, "read"]
    assert one.answer == "a"
    assert colours(placed) == [COLOURS[2], COLOURS[0]]
    kinds = [part["type"] for part in placed.messages[1]["content"]]
    assert kinds == ["image", "text", "image", "text"]
    assert [part["type"] for part in before.messages[1]["content"]] == ["image", "image", "text"]
    assert one.group_id == placed.group_id != before.group_id == "mine"


def test_a_document_is_on_one_side_of_the_split(tmp_path):
    for number in range(6):
        pages(tmp_path / f"{number}.pdf", *COLOURS, (number, 100, 100))
    (tmp_path / "copy.pdf").write_bytes((tmp_path / "0.pdf").read_bytes())
    names = [*(f"{number}.pdf" for number in range(6)), "copy.pdf"]
    samples = found(tmp_path, *(row(name, page) for page in (1, 2, 3, 4) for name in names))
    settings = SplitConfig(select=0.3, report=0.3)
    sides: dict[str, set[str]] = {}
    for index, sample in enumerate(samples):
        name = names[index % len(names)].replace("copy", "0")
        sides.setdefault(name, set()).add(split_of(sample.group_id, settings, 0))
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 6
    assert len({sample.group_id for sample in samples}) == 6


def test_the_resolution_follows_dpi_and_the_budget(tmp_path):
    pages(tmp_path / "a.pdf", COLOURS[0])
    pages(tmp_path / "a.tiff", COLOURS[0], size=(400, 100))
    sizes = [
        decode(found(tmp_path, row("a.pdf"), **options)[0].images[0], LIMITS).size
        for options in ({"dpi": 72}, {"dpi": 144}, {"dpi": 600, "max_pixels": 20_000})
    ]
    assert sizes == [(72, 36), (144, 72), (200, 100)]
    tiff = found(tmp_path, row("a.tiff"), max_pixels=10_000)[0]
    assert decode(tiff.images[0], LIMITS).size == (200, 50)


def test_broken_documents_are_quarantined_with_their_reason(tmp_path):
    pages(tmp_path / "good.pdf", *COLOURS)
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing follows")
    (tmp_path / "cut.tiff").write_bytes(b"II*\0\x08\0\0\0")
    (tmp_path / "other.pdf").write_text("a letter")
    (tmp_path / "empty.pdf").write_bytes(b"")
    key = "<00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff>"
    encrypt = f"/Encrypt<</Filter/Standard/V 1/R 2/O{key}/U{key}/P -4>>/ID[<00><00>]"
    raw_pdf(tmp_path / "locked.pdf", "/MediaBox[0 0 9 9]", trailer=encrypt)
    names = ("broken.pdf", "cut.tiff", "other.pdf", "empty.pdf", "locked.pdf", "../x.pdf")
    rows = [*(row(name) for name in names), row("good.pdf", 4), row("good.pdf", 3)]
    said = reasons(found(tmp_path, *rows))
    assert said[0].startswith("the PDF cannot be opened: ")
    assert said[1].startswith("cannot read the TIFF")
    assert said[2] == "the document is neither a PDF nor a TIFF: other.pdf"
    assert said[3] == "the document is neither a PDF nor a TIFF: empty.pdf"
    assert said[4] == "the PDF is encrypted: it needs a password"
    assert said[5].startswith("document is outside the source's folder")
    assert said[6:] == ["there is no page 4: the PDF has 3", ""]


def test_bombs_are_refused_before_they_are_rendered(tmp_path):
    raw_pdf(tmp_path / "vast.pdf", "/MediaBox[0 0 90000 90000]")
    stream = "<</Length 8/Filter/FlateDecode/Type/XObject/Subtype/Image/ColorSpace/DeviceGray"
    picture = f"{stream}/BitsPerComponent 8/Width 60000/Height 60000>>\nstream\n12345678\nendstream"
    draw = "<</Length 20>>\nstream\n9 0 0 9 0 0 cm /I Do\nendstream"
    page = "/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</XObject<</I 5 0 R>>>>"
    raw_pdf(tmp_path / "picture.pdf", page, draw, picture)
    pages(tmp_path / "long.pdf", *COLOURS)
    pages(tmp_path / "long.tiff", *COLOURS)
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, format="TIFF", compression="group4")
    (tmp_path / "vast.tiff").write_bytes(buffer.getvalue())
    names = ("vast.pdf", "picture.pdf", "long.pdf", "long.tiff", "vast.tiff")
    said = reasons(found(tmp_path, *map(row, names), max_pages=2))
    limit = f"the limit is {LIMITS.max_pixels}"
    assert said[0] == f"page 1 at 150 dpi has 187500 x 187500 pixels, {limit}"
    assert said[1] == f"a picture in page 1 has 60000 x 60000 pixels, {limit}"
    assert said[2] == "the PDF has 3 pages, the limit is 2"
    assert said[3] == "the TIFF has more pages than the limit, 2"
    assert said[4] == f"page 1 has 9000 x 9000 pixels, {limit}"
    assert "more than 200 bytes" in reasons(found(tmp_path, row("long.pdf"), max_bytes=200))[0]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"page": 0, "text": "a"}, "column 'page' must hold page numbers from 1, not 0"),
        ({"page": "1", "text": "a"}, "column 'page' must hold page numbers from 1, not 1"),
        ({"page": [], "text": "a"}, "column 'page' holds no page"),
        ({"page": 1}, "one of the columns 'text' and 'messages' must be given, not 0"),
        ({"page": 1, "text": "a", "messages": []}, "one of the columns 'text' and 'messages' must"),
        (
            {"page": [1, 2], "messages": [{"role": "user", "content": "<image>"}]},
            "1 <image> placeholder but 2 images (pages)",
        ),
        (
            {
                "page": 1,
                "messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}],
            },
            "the messages name images of their own",
        ),
    ],
)
def test_rows_that_say_too_little_or_too_much(columns, reason, tmp_path):
    pages(tmp_path / "a.pdf", *COLOURS)
    assert reasons(found(tmp_path, {"file": "a.pdf", **columns}))[0].startswith(reason)


def test_each_document_is_opened_once_and_the_renderer_is_part_of_the_shard(tmp_path, monkeypatch):
    opened: list[str] = []

    def note(name: str, *arguments: Any, **options: Any) -> bytes:
        opened.append(name)
        return read_image(name, *arguments, **options)

    monkeypatch.setattr(pdf, "read_image", note)
    for name in ("a.pdf", "b.pdf"):
        pages(tmp_path / name, *COLOURS)
    rows = [row(name, page) for name in ("a.pdf", "b.pdf") for page in (1, 2, 3)]
    assert all(isinstance(item, Sample) for item in found(tmp_path, *rows))
    assert opened == ["a.pdf", "b.pdf"]
    shard = shards_of("pdf", tmp_path / "rows.jsonl", tmp_path)[0]
    assert shard.details == f"pypdfium2 {version('pypdfium2')}"
    limits = ImageLimits(max_pixels=100)
    config = config_of("pdf", tmp_path / "rows.jsonl")
    said = reasons(list(SOURCES["pdf"].read_shard(config, shard, limits)))
    assert said[0] == "page 1 at 150 dpi has 150 x 75 pixels, the limit is 100"


def scan(turned: float = 0.0) -> Image.Image:
    """A grey page of dark lines of words that rise by so many degrees."""
    page = Image.new("L", (420, 560), 200)
    draw, rng = ImageDraw.Draw(page), np.random.default_rng(0)
    for line in range(40, 520, 24):
        for word in range(40, 360, 40):
            draw.rectangle((word, line, word + int(rng.integers(15, 34)), line + 8), fill=90)
    return page.rotate(turned, Image.Resampling.BICUBIC, fillcolor=200).convert("RGB")


@pytest.mark.parametrize("degrees", [-4.3, -0.7, 0.0, 2.4])
def test_a_page_that_slopes_is_made_level(degrees, tmp_path):
    assert scans.slope(scan(degrees)) == pytest.approx(degrees, abs=0.15)
    scan(degrees).save(tmp_path / "a.tiff")
    (plain,) = found(tmp_path, row("a.tiff"))
    (level,) = found(tmp_path, row("a.tiff"), deskew=True)
    assert scans.slope(decode(level.images[0], LIMITS)) == pytest.approx(0, abs=0.11)
    assert (plain.images == level.images) == (degrees == 0)


def test_noise_and_empty_pages_are_not_turned():
    noise = np.random.default_rng(1).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    assert scans.slope(Image.fromarray(noise)) == 0
    assert scans.slope(Image.new("RGB", (300, 200), (255, 255, 255))) == 0


def test_contrast_is_stretched_to_the_full_range(tmp_path):
    scan().save(tmp_path / "a.tiff")
    (sample,) = found(tmp_path, row("a.tiff"), autocontrast=True)
    shown = np.asarray(decode(sample.images[0], LIMITS))
    assert (shown.min(), shown.max()) == (0, 255)
