"""Parts of the report page that look across trials or samples, and the files beside it."""

from __future__ import annotations

import csv
import json
import shutil

import numpy
import pyarrow.parquet
import pytest
from made import experiment
from sweep_folder_example import build_example

from raytune_vlm.prepare.facts import write_facts
from raytune_vlm.records import SweepFolder, read_json, write_json
from raytune_vlm.report.cost import quality_against_cost
from raytune_vlm.report.faults import faults
from raytune_vlm.report.gallery import differences
from raytune_vlm.report.headline import headline
from raytune_vlm.report.html import build_report
from raytune_vlm.report.importance import importance
from raytune_vlm.report.leaderboard import leaderboard
from raytune_vlm.report.loading import load_view
from raytune_vlm.report.model_card import model_card
from raytune_vlm.report.parallel import parallel_coordinates
from raytune_vlm.report.slices import slices
from raytune_vlm.report.sparklines import losses
from raytune_vlm.report.timeline import rung_timeline


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return build_example(tmp_path_factory.mktemp("parts") / "sweep")


@pytest.fixture
def copy(example, tmp_path):
    """A copy that the test may alter."""
    shutil.copytree(example.root, tmp_path / "sweep")
    return SweepFolder(tmp_path / "sweep")


def with_cells(folder, **cells):
    """Overwrite columns of the predictions on `report`; a value is a function of the row number."""
    for file in folder.root.glob("trials/*/evaluations/report/*/predictions.parquet"):
        rows = pyarrow.parquet.read_table(file).to_pylist()
        for number, row in enumerate(rows):
            row.update({name: value(number) for name, value in cells.items()})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def test_importance_tells_n_and_warns(example):
    found = importance(load_view(example.root))
    assert found.keys[0].key == "train.learning_rate"  # what decides in the example
    assert sum(entry.share for entry in found.keys) == pytest.approx(1)
    assert (found.num_trials, found.num_best) == (15, 4)
    assert "Only 15 trials: the best quarter is 4." in found.warning


def test_importance_of_keys_that_only_some_trials_have(copy):
    for number, file in enumerate(sorted(copy.root.glob("trials/trial_*/trial.json"))):
        plain = read_json(file)
        if number % 2:
            del plain["recipe"]["lora.dropout"]
        plain["recipe"]["same"] = True
        write_json(file, plain)
    keys = {entry.key: entry for entry in importance(load_view(copy.root)).keys}
    assert keys["lora.dropout"].num_trials == 8 and "same" not in keys
    assert parallel_coordinates(load_view(copy.root)) is not None


def test_too_few_trials_have_no_importance(copy):
    for number in range(5, 16):
        shutil.rmtree(copy.trial(f"trial_{number:03d}").root)
    found = importance(load_view(copy.root))
    assert found.keys == [] and found.warning.startswith("5 trials with a score are too few")


def test_slices_are_weighted_as_the_whole_is(copy):
    name = "nted@donut"
    weights = {f"{name}/weight": lambda number: float(1 + number % 3)}
    with_cells(copy, prompt=lambda number: "<i>a</i>" if number < 10 else "b", **weights)
    view = load_view(copy.root)
    found = [entry for entry in slices(view) if entry.cut == "prompt"]
    assert [(entry.name, entry.num_samples) for entry in found] == [("<i>a</i>", 10), ("b", 30)]
    file = copy.trial(view.result.winner).evaluation("report", view.result.winner_step)
    rows = pyarrow.parquet.read_table(file / "predictions.parquet").to_pylist()[:10]
    values, weight = [row[name] for row in rows], [row[f"{name}/weight"] for row in rows]
    assert found[0].winner == pytest.approx(numpy.average(values, weights=weight))
    assert found[0].lower < found[0].winner - found[0].base < found[0].upper
    assert (found[0].says, found[0].is_few, found[1].is_few) == ("better", True, False)
    page = build_report(copy.root).read_text()
    assert "&lt;i&gt;a&lt;/i&gt;" in page and "<i>a" not in page


def test_slices_by_what_references_and_records_say(copy):
    def reference(number):
        answers = ["x", "y"] if number % 2 else ["x" * (1 + number)]
        return json.dumps({"answers": answers, "category": "abcde"[number % 5]})

    with_cells(copy, reference=reference)
    rows = pyarrow.parquet.read_table(
        next(copy.root.glob("trials/base/evaluations/report/*/predictions.parquet"))
    ).to_pylist()
    overlap = {"split": "report", "with_split": "train", "is_counted": True}
    copy.overlap_file.write_text(json.dumps({"sample_id": rows[0]["sample_id"], **overlap}) + "\n")
    found = slices(load_view(copy.root))
    sizes = {(entry.cut, entry.name): entry.num_samples for entry in found}
    assert sizes["right answers", "several"] == 20
    assert sizes["like a training sample", "yes"] == 1
    assert [name for cut, name in sizes if cut == "category"] == list("abcde")
    few = next(entry for entry in found if entry.cut == "like a training sample")
    assert few.name == "no" and found[found.index(few) + 1].says == "few groups"
    lengths = [entry.num_samples for entry in found if entry.cut.startswith("length of the ref")]
    assert sum(lengths) == 40


def test_slices_by_image_size_and_source(copy):
    assert not {"source", "size of the images, in pixels"} & {
        e.cut for e in slices(load_view(copy.root))
    }
    rows = pyarrow.parquet.read_table(
        next(copy.root.glob("trials/base/evaluations/report/*/predictions.parquet"))
    ).to_pylist()
    facts = [
        {"sample_id": row["sample_id"], "pixels": 1000 * number, "source": f"<i>shop{number % 2}"}
        for number, row in enumerate(rows)
    ]
    copy.facts_file.write_text("".join(json.dumps(entry) + "\n" for entry in facts))
    found = {(entry.cut, entry.name): entry.num_samples for entry in slices(load_view(copy.root))}
    sizes = {name: n for (cut, name), n in found.items() if cut.startswith("size of the images")}
    assert sizes == {"0 to 12,000": 13, "13,000 to 25,000": 13, "26,000 to 39,000": 14}
    assert found["source", "<i>shop0"] == found["source", "<i>shop1"] == 20
    page = build_report(copy.root).read_text()
    assert "&lt;i&gt;shop0" in page and "<i>shop0" not in page
    copy.facts_file.write_text(json.dumps(facts[0]) + "\n")  # of another choice of samples
    assert not {"source"} & {entry.cut for entry in slices(load_view(copy.root))}


def test_source_and_image_size_are_noted_for_every_sample(tiny_prompts, tmp_path):
    split, file = tiny_prompts("idefics3"), tmp_path / "facts.jsonl"
    write_facts(file, split, experiment().data)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == split.sample_ids
    assert [row["pixels"] for row in rows] == [64 * (40 + number) for number in range(len(split))]
    assert {row["source"] for row in rows} == {"train.jsonl (messages)"}


def test_no_slices_of_a_metric_that_is_no_mean(copy):
    with_cells(copy, **{"nted@donut/sums": lambda number: [1.0]})
    assert slices(load_view(copy.root)) == []


def test_differences_mark_words_against_the_nearest_answer():
    assert differences("a red cat sat", ("nothing", "a black cat sat down")) == (
        ("a ", ""),
        ("red ", "wrong"),
        ("black ", "missing"),
        ("cat ", ""),
        ("sat", "wrong"),
        ("sat down", "missing"),
    )
    assert differences("tea", ("coffee",)) == ()
    assert differences("tea " * 2000, ("tea",)) == ()


def test_faults_come_from_ledger_and_records(copy):
    events = [
        {"event": "resumed", "time": 1.8e9},
        {"event": "noted", "trial_id": "trial_002", "message": "=1+1 <b>", "time": 1.8e9},
    ]
    with copy.ledger_file.open("a") as stream:
        stream.writelines(json.dumps(event) + "\n" for event in events)
    record = copy.trial("trial_002").record_file
    write_json(record, read_json(record) | {"notes": ["=1+1 <b>"], "micro_batch": {"size": 2}})
    found = faults(load_view(copy.root))
    told = [(fault.trial_id, fault.kind, fault.message) for fault in found]
    assert ("", "resumed", "") in told
    assert told.count(("trial_002", "note", "=1+1 <b>")) == 1
    assert ("trial_002", "micro-batch", "size 2") in told
    assert [fault.trial_id for fault in found if fault.kind == "failed"] == [
        "trial_011",
        "trial_013",
    ]
    assert any("loss is not finite" in fault.message for fault in found)


def test_a_winner_of_a_population_is_told_with_its_lineage(copy):
    before = load_view(copy.root)
    winner, key = before.winner, "train.learning_rate"
    origin = {"parent": "trial_001", "step": 50}
    origin["recipe"] = {**winner.record.recipe, key: 0.5}
    clone = {"trial_id": winner.trial_id, "origin": origin}
    event = {"event": "exploited", "step": 50, "time": 1.8e9}
    event["exploits"] = [{"replaces": "trial_002", "clone": clone}]
    with copy.ledger_file.open("a") as stream:
        stream.write(json.dumps(event) + "\n")
    view = load_view(copy.root)
    outcomes = {row.trial_id: row.outcome for row in leaderboard(view)}
    assert "clone of trial_001 at step 50" in outcomes[winner.trial_id]
    assert f"replaced by {winner.trial_id} at step 50" in outcomes["trial_002"]
    (fact,) = [fact for fact in headline(view).facts if fact[0] == "Lineage"]
    assert fact[1] == f"trial_001, then {winner.trial_id}"
    assert f"found by a schedule, {key} 0.5 to step 50" in fact[2]
    assert "found by a schedule: `train.learning_rate 0.5 to step 50" in model_card(copy)
    assert not any(fact[0] == "Lineage" for fact in headline(before).facts)
    assert view.num_planned == before.num_planned + 1


def test_plots_over_trials(example):
    view = load_view(example.root)
    assert "A line for each of 16 trials" in rung_timeline(view).alt
    titles = [plot.title for plot in quality_against_cost(view)]
    assert titles == ["Quality against training time", "Quality against trainable parameters"]
    assert "lora.rank, train.learning_rate, lora.scope" in parallel_coordinates(view).alt
    drawn = losses(view)
    assert len(drawn) == 15 and "trial_011" not in drawn  # failed before its first step


def test_a_text_that_is_a_formula_is_none_in_the_csv_file(copy):
    formula = '=HYPERLINK("https://example.org")<script>alert(1)</script>'
    record = copy.trial("trial_013").record_file
    write_json(record, read_json(record) | {"failure": formula})
    page = build_report(copy.root).read_text()
    assert page.count("<script") == 1
    assert page.count("&lt;script&gt;alert(1)") == 3  # the cell, what it is sorted by, the fault
    with (copy.report / "leaderboard.csv").open(newline="") as stream:
        rows = {row["trial_id"]: row for row in csv.DictReader(stream)}
    assert rows["trial_013"]["failure"] == f"'{formula}"
    plain = read_json(copy.report / "leaderboard.json")["rows"]
    assert formula in [row["failure"] for row in plain]


def test_the_page_stays_small_however_long_trials_are(copy):
    for file in copy.root.glob("trials/*/metrics.jsonl"):
        rows = [{"step": step, "loss": 1 + 1 / step} for step in range(1, 5001)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report(copy.root).read_text()
    assert len(page) < 1_500_000
    assert 'data-v="5.6' not in page and page.count('class="loss"') == 16
    assert "flattered by having been picked; 95\u00a0% interval" in page
    assert page.count('<span class="pill">tied</span>') == 3


def test_png_files_of_every_plot(tmp_path):
    folder = build_example(tmp_path / "sweep", state="single")
    page = build_report(folder.root, png=True).read_text()
    files = {file.name: file.read_bytes() for file in (folder.report / "plots").iterdir()}
    assert {"loss-trial-000.png", "curves-training-loss-by-step.png", "data-train.png"} <= set(
        files
    )
    assert all(content.startswith(b"\x89PNG") for content in files.values())
    assert "plots/" not in page
