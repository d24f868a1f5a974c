"""Teachers and samplings compared field by field, the review list, and what comes back from it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from made import picture
from test_sources import read

from raytune_vlm.cli import cli
from raytune_vlm.config.label import LabelConfig
from raytune_vlm.errors import ConfigError, DataError
from raytune_vlm.label.agreement import compare, similarity, summary
from raytune_vlm.label.folder import LabelFolder, Result, write_config
from raytune_vlm.label.pages import Page
from raytune_vlm.label.review import MAX_SHOWN
from raytune_vlm.records import read_json, read_json_lines

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": ["string", "null"]}, "items": {"type": "array"}},
    "required": ["kind"],
}


def folder_of(root, teachers, answers):
    """A folder of labels; answers: `(page number, task, teacher, sampling) -> value`."""
    config = LabelConfig.model_validate(
        {
            "output": str(root),
            "files": ["x"],
            "tasks": [
                {"name": "text", "prompt": "read"},
                {"name": "kind", "prompt": "what?", "answer_schema": SCHEMA},
            ],
            "teachers": [
                {"name": name, "base_url": "http://localhost:1", "model": "m", "samples": samples}
                | ({"temperature": 1.0} if samples > 1 else {})
                for name, samples in teachers.items()
            ],
        }
    )
    folder = LabelFolder(root)
    results = []
    for (number, task, teacher, sampling), value in answers.items():
        file = root.parent / f"{number}.png"
        if not file.exists():
            picture(number).save(file)
        page = Page(f"scans/{number}.png", f"g{number}", (file.read_bytes(),))
        names = folder.keep_images(page)
        found = (page.page_id, page.origin, page.group_id, names, task, teacher, sampling)
        results.append(Result(*found, value, False))
    write_config(folder, config)
    folder.write_results(config, results, [])
    return folder


def agree(*arguments):
    return CliRunner().invoke(cli, ["data", "agree", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize(
    "first, second, score",
    [
        ("\uff21  b\n", "a B", 1),
        ("41.20", "41.2", 0),
        (41.20, 41.2, 1),
        (1, True, 0),
        (None, "x", 0),
        ("word " * 10, "word " * 9 + "wort", 1 - 1 / 49),
        ("x" * 41, 3, 0),
    ],
)
def test_values_are_compared_as_people_would(first, second, score):
    assert similarity(first, second) == pytest.approx(score)


TWO = {"a": 1, "b": 1}


def kinds(*pairs):
    return {
        (number, "kind", teacher, 0): {"kind": value}
        for number, pair in enumerate(pairs)
        for teacher, value in zip("ab", pair, strict=True)
    }


def test_fields_are_rated_with_interval_and_against_chance(tmp_path):
    # Krippendorff's alpha by hand: 6 pages, 1 apart; 12 values, x 7 and y 5.
    pairs = [("x", "x"), ("X", "x "), ("x", "y"), ("y", "y"), ("y", "y"), ("x", "x")]
    folder = folder_of(tmp_path / "out", TWO, kinds(*pairs))
    (field,) = summary(compare(folder.answers_by_labeller()), 0.9)
    assert (field.task, field.field, field.num_pages, field.num_low) == ("kind", "kind", 6, 1)
    assert field.agreement.value == pytest.approx(5 / 6)
    assert field.agreement.lower < 5 / 6 < field.agreement.upper <= 1
    assert field.alpha == pytest.approx(1 - (2 / 12) / (1 - (7 * 6 + 5 * 4) / (12 * 11)))


def test_lists_and_nothing_are_compared_and_the_most_agreeable_answer_is_proposed(tmp_path):
    values = [
        {"kind": None, "items": [{"n": "tea", "p": 1}, {"n": "bun", "p": 2}]},
        {"kind": "", "items": [{"n": "Tea", "p": 1.0}, {"n": "bun", "p": 3}]},
        {"items": [{"n": "tea", "p": 1}, {"n": "pie", "p": 3}, {"n": "egg"}]},
    ]
    answers = {(0, "kind", "a", place): value for place, value in enumerate(values)}
    folder = folder_of(tmp_path / "out", {"a": 3}, answers)
    (entry,) = compare(folder.answers_by_labeller())
    assert list(entry.values) == ["a #1", "a #2", "a #3"] and entry.proposed == "a #2"
    assert entry.scores[("items", 0, "p")] == 1 and entry.scores[("kind",)] == 1
    assert entry.scores[("items", 1, "p")] == pytest.approx(1 / 3)
    rated = {field.field: field.agreement.value for field in summary([entry], 0.9)}
    assert rated == pytest.approx(
        {"kind": 1, "items[].n": (1 + 1 / 3 + 1 / 3) / 3, "items[].p": 2 / 3}
    )


class Shown(HTMLParser):
    """The parts of a page that a test asks for."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.policy, self.script = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "meta" and dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]
        self.script = "" if tag == "script" else self.script

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and not self.script:
            self.script = data


def test_what_differs_is_reviewed_on_a_page_and_comes_back(tmp_path):
    hostile = '</textarea><script>alert(1)</script>"'
    answers = kinds(("x", "x"), ("x", "y"), (hostile, "z")) | {
        (0, "text", "a", 0): "the whole long text of a page with some words",
        (0, "text", "b", 0): "the whole long text of a page with quite other words",
        (3, "text", "a", 0): "alone",
    }
    folder = folder_of(tmp_path / "out", TWO, answers)
    done = agree(folder.root)
    assert "kind kind: 0.333" in done.output and "1 labels" in done.output
    assert "to review: 4" in done.output
    rows = read_json_lines(folder.root / "review.jsonl")
    assert [(row["origin"], row["task"], row["differs"]) for row in rows] == [
        ("scans/1.png", "kind", ["kind"]),
        ("scans/2.png", "kind", ["kind"]),
        ("scans/3.png", "text", [""]),
        ("scans/0.png", "text", [""]),
    ]
    text = (folder.root / "review.html").read_text()
    page = Shown(text)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy and "default-src 'none'" in page.policy
    assert [tag for tag, _ in page.tags].count("script") == 1 and "alert(1)</script>" not in text
    pictures = [named["src"] for tag, named in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(uri.startswith("data:image/jpeg") for uri in pictures)
    assert "<mark>quite other </mark>" in text and "Only one answer" in text

    first, second, alone, _ = rows
    decisions = [
        {"page": first["page"], "task": "kind", "value": {"kind": "y"}},
        {"page": second["page"], "task": "kind", "discard": True},
        {**alone, "value": "mended", "reviewed": True},
    ]
    file = tmp_path / "reviewed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*decisions, rows[3]]))
    done = agree(folder.root, "--reviewed", file)
    assert "taken over: 3 decisions" in done.output
    assert "3 labels" in done.output and "2 reviewed; 1 discarded" in done.output
    found = read("messages", folder.root / "agreed.jsonl", folder.root)
    assert sorted(sample.answer for sample in found) == ["mended", '{"kind": "x"}', '{"kind": "y"}']
    assert agree(folder.root, "--threshold", "0.5").output.count("to review") == 0
    assert read_json(folder.root / "agreement.json")["reviewed"] == 2
    assert not (set(re.findall(r"https?://", text)))


@pytest.mark.parametrize(
    "row, why",
    [
        ("no json", ":1: is no JSON object"),
        ({"page": "x", "task": "kind", "value": {}}, "no page 'x'"),
        ({"task": "kind", "value": {"kind": 3}}, r"\$\.kind: 3 is not of type"),
        ({"task": "kind"}, "neither a value nor discard"),
    ],
)
def test_decisions_that_do_not_fit_are_refused(row, why, tmp_path):
    folder = folder_of(tmp_path / "out", TWO, kinds(("x", "y")))
    agree(folder.root)
    page = read_json_lines(folder.root / "review.jsonl")[0]["page"]
    file = tmp_path / "reviewed.jsonl"
    file.write_text(row if isinstance(row, str) else json.dumps({"page": page} | row))
    with pytest.raises(DataError, match=why):
        agree(folder.root, "--reviewed", file)
    assert not (folder.root / "reviewed.jsonl").exists()
    with pytest.raises(DataError, match="none: No such file"):
        agree(folder.root, "--reviewed", tmp_path / "none")


def test_two_folders_are_compared_where_both_have_an_answer(tmp_path):
    one = folder_of(
        tmp_path / "one", {"a": 1}, {(n, "kind", "a", 0): {"kind": "x"} for n in (0, 1)}
    )
    two = folder_of(
        tmp_path / "two", {"a": 1}, {(n, "kind", "a", 0): {"kind": "y"} for n in (1, 2)}
    )
    found = compare(one.answers_by_labeller(two))
    assert [len(entry.values) for entry in found] == [1, 2]
    with pytest.raises(DataError, match="nothing to compare"):
        agree(one.root)
    assert "to review: 2" in agree(one.root, two.root).output
    with pytest.raises(ConfigError, match="no folder of labels"):
        agree(tmp_path)


def test_a_second_sampling_that_is_none_is_told(tmp_path):
    same = {(n, "kind", "a", place): {"kind": str(n)} for n in (0, 1) for place in (0, 1)}
    folder = folder_of(tmp_path / "out", {"a": 2}, same)
    assert "a #2 answers everything exactly as another one" in agree(folder.root).output
    other = folder_of(tmp_path / "other", {"a": 2}, same | {(1, "kind", "a", 1): {"kind": "x"}})
    assert "exactly" not in agree(other.root).output


def test_a_long_list_is_shown_in_parts(tmp_path):
    pairs = [("x", "y")] * (MAX_SHOWN + 5)
    folder = folder_of(tmp_path / "out", TWO, kinds(*pairs))
    agree(folder.root)
    page = Shown((folder.root / "review.html").read_text())
    sections = [named for tag, named in page.tags if tag == "section" and "data-page" in named]
    assert len(sections) == MAX_SHOWN
    assert len(read_json_lines(folder.root / "review.jsonl")) == MAX_SHOWN + 5
    assert Path(folder.root / "agreed.jsonl").read_text() == ""
