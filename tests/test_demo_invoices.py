"""The generated invoices: whole documents, read back as they were written, Arabic joined."""

from __future__ import annotations

import json

import pytest

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import PdfSource
from raytune_vlm.demo.invoices import LANGUAGES, LAYOUTS, shaped, write_invoices
from raytune_vlm.errors import DataError
from raytune_vlm.json_tokens import token2json
from raytune_vlm.records import Sample
from raytune_vlm.sources import SOURCES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("invoices") / "data"
    write_invoices(path, num_documents=16)
    return path


def test_pages_are_read_as_they_were_written(folder):
    pytest.importorskip("pypdfium2")
    rows = [json.loads(line) for line in (folder / "pages.jsonl").read_text().splitlines()]
    config = PdfSource(type="pdf", path="pages.jsonl", dpi=72)
    reader = SOURCES["pdf"]
    (shard,) = reader.list_shards(config, folder, False)
    samples = list(reader.read_shard(config, shard, ImageLimits()))
    assert len(samples) == len(rows) and all(isinstance(entry, Sample) for entry in samples)
    groups: dict[str, set[str]] = {}
    for row, sample in zip(rows, samples, strict=True):
        groups.setdefault(row["file"], set()).add(sample.group_id)
    # A document is one group, and no two are the same: it can only be on one side of a split.
    assert all(len(found) == 1 for found in groups.values())
    assert len(set().union(*groups.values())) == len(groups) == 16
    assert {row["language"] for row in rows} == set(LANGUAGES)
    assert {row["layout"] for row in rows} <= set(LAYOUTS)


def test_the_truth_adds_up(folder):
    documents: dict[str, list[dict]] = {}
    for line in (folder / "pages.jsonl").read_text().splitlines():
        row = json.loads(line)
        documents.setdefault(row["file"], []).append(token2json(row["text"]))
    for pages in documents.values():
        assert set(pages[0]) == {"no", "date"}
        prices = [item["price"] for page in pages[1:-1] for item in page["menu"]]
        cents = {key: round(100 * float(value)) for key, value in pages[-1].items()}
        assert cents["net"] == sum(round(100 * float(price)) for price in prices)
        assert cents["total"] == cents["net"] + cents["vat"]


def test_the_same_seed_writes_the_same_and_never_over_anything(folder, tmp_path):
    write_invoices(tmp_path / "again", num_documents=2)
    for file in (tmp_path / "again" / "documents").iterdir():
        assert file.read_bytes() == (folder / "documents" / file.name).read_bytes()
    with pytest.raises(DataError, match="is not empty"):
        write_invoices(folder)


def test_arabic_letters_are_joined_and_stand_from_right_to_left():
    # Qaf, lam, meem: initial, medial, final form, the first letter at the right.
    assert shaped("قلم") == "\ufee2\ufee0\ufed7"
    # Reh joins nothing after it: what follows begins anew.
    assert shaped("رقم") == "\ufee2\ufed7\ufead"
    assert shaped("TÜR 12") == "TÜR 12"


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_the_fonts_have_every_letter(language):
    from raytune_vlm.demo.invoices import _FONTS
    from raytune_vlm.demo.lines import load_font

    words = LANGUAGES[language]
    text = shaped("".join((words.number, words.date, words.net, words.vat, words.total)))
    text += "".join(map(shaped, words.items))
    for name in _FONTS:
        font = load_font(name, 40)
        missing = bytes(font.getmask("\uffff"))
        assert all(bytes(font.getmask(letter)) != missing for letter in text)
