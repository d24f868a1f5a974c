"""Controls and robustness on the report page."""

from __future__ import annotations

import pytest
from sweep_folder_example import build_example

from raytune_vlm.comparisons import Comparison, Comparisons
from raytune_vlm.records import PairedTest, write_json, write_text
from raytune_vlm.report.controls import controls_section
from raytune_vlm.report.html import build_report
from raytune_vlm.report.loading import load_view

METRIC = "nted@donut"


def compared(name, plain, altered, reach=0.05):
    difference = altered - plain
    bounds = (difference - reach, difference + reach)
    test = PairedTest(METRIC, name, "plain", difference, *bounds, 0.01, 40)
    return Comparison(name, 40, {METRIC: plain}, {METRIC: altered}, {METRIC: test})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    built = build_example(tmp_path_factory.mktemp("controls") / "sweep")
    view = load_view(built.root)
    for role, plain in (("base", 0.3), ("winner", 0.8)):
        step = view.report_scores(role).step
        evaluation = built.trial(view.role_of(role)).evaluation("report", step)
        entries = [
            compared("blank_image", plain, 0.28),
            Comparison("text_only", skipped="no prompt without an image"),
            compared("gold", plain, 1.0),
        ]
        notes = ["the base model <b>looks</b> not"] if role == "base" else []
        write_json(evaluation / "controls.json", Comparisons(entries, notes))
        curve = [compared(f"jpeg_quality={x}", plain, plain - 0.1) for x in (90, 20)]
        write_json(evaluation / "robustness.json", Comparisons(curve))
    return built


def test_the_table_says_what_a_control_did(folder):
    found = controls_section(load_view(folder.root))
    says = {(row.role, row.entry.name): row.says for row in found["rows"]}
    assert says["winner", "blank_image"] == "worse"
    assert says["base", "blank_image"] == "cannot tell"
    assert says["winner", "gold"] == "better"
    assert says["base", "text_only"] == "no prompt without an image"
    (plot,) = found["plots"]
    assert "winner: 0.800 as they are, 0.700 at 20, 0.700 at 90" in plot.alt
    assert plot.uri.startswith("data:image/svg+xml")


def test_the_page_shows_them_escaped(folder):
    page = build_report(folder.root).read_text()
    assert 'id="controls"' in page and "blank images" in page
    assert "the base model &lt;b&gt;looks&lt;/b&gt; not" in page
    assert "Robustness: JPEG quality" in page


def test_a_damaged_file_is_told_and_the_page_stands(folder):
    view = load_view(folder.root)
    step = view.report_scores("winner").step
    evaluation = folder.trial(view.role_of("winner")).evaluation("report", step)
    for text in ("{", "[]", '{"entries": [{"name": 1}], "notes": []}'):
        write_text(evaluation / "controls.json", text)
        found = controls_section(load_view(folder.root))
        assert "controls.json cannot be read" in found["problems"][0]
        assert {row.role for row in found["rows"]} == {"base"}
