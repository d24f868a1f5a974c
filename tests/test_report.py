"""The report page, its files and the model card, on example sweep folders."""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from sweep_folder_example import build_example

from raytune_vlm.errors import DataError
from raytune_vlm.json_tokens import json2token, token2json
from raytune_vlm.records import (
    PairedTest,
    SweepFolder,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)
from raytune_vlm.report.formatting import duration, recipe_value
from raytune_vlm.report.gallery import compare, gallery, tree_of
from raytune_vlm.report.headline import clearly, headline
from raytune_vlm.report.html import build_report
from raytune_vlm.report.leaderboard import leaderboard
from raytune_vlm.report.loading import load_view
from raytune_vlm.report.model_card import model_card
from raytune_vlm.report.plots import learning_curves
from raytune_vlm.report.space_plots import space_plots

Copy = Callable[..., SweepFolder]


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SweepFolder]:
    """Example folders, each built once."""
    built: dict[str, SweepFolder] = {}

    def get(mode: Any = "max", state: Any = "finished", hostile: bool = False) -> SweepFolder:
        name = f"{mode}-{state}-{hostile}"
        if name not in built:
            root = tmp_path_factory.mktemp("example") / name
            built[name] = build_example(root, mode=mode, state=state, hostile=hostile)
        return built[name]

    return get


@pytest.fixture
def copy(examples: Copy, tmp_path: Path) -> Copy:
    """A copy that the test may alter."""

    def get(**options: Any) -> SweepFolder:
        shutil.copytree(examples(**options).root, tmp_path / "sweep")
        return SweepFolder(tmp_path / "sweep")

    return get


class _Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    void = frozenset({"meta", "img", "link", "br", "wbr", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.text = re.sub(r"[\s\u00a0]+", " ", self.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "dd", "small"):
            self.text += " "
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


@functools.cache
def html_of(folder: SweepFolder) -> str:
    """The page of a folder, built once for each folder object."""
    return build_report(folder.root).read_text(encoding="utf-8")


@functools.cache
def page_of(folder: SweepFolder) -> _Page:
    """The same, parsed."""
    return _Page(html_of(folder))


@pytest.mark.parametrize(
    ("mode", "state"),
    [
        ("max", "finished"),
        ("min", "finished"),
        ("max", "running"),
        ("max", "empty"),
        ("max", "single"),
        ("max", "unclear"),
    ],
)
def test_page_is_self_contained_in_every_state(examples: Copy, mode: str, state: str) -> None:
    page = page_of(examples(mode=mode, state=state))
    names = {tag for tag, _ in page.tags}
    assert not names & {"iframe", "object", "embed", "form", "link", "base", "svg"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/", "#")), (tag, value)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    text = html_of(examples(mode=mode, state=state))
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "innerHTML" not in script and "eval" not in script
    anchors = {a["href"] for t, a in page.tags if t == "a"}
    assert anchors == {f"#{a['id']}" for t, a in page.tags if t == "section"}


def test_style_sheet_fetches_nothing(examples: Copy) -> None:
    text = html_of(examples())
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_everything_from_outside_is_escaped(examples: Copy) -> None:
    text = html_of(examples(hostile=True))
    assert text.count("<script") == 1 and "<script>//" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;script&gt;alert(4)&lt;/script&gt;" in text
    assert "&lt;b onclick=&#34;alert(3)&#34;&gt;boom&lt;/b&gt; &amp;" in text
    assert "&lt;img src=x onerror=alert(2)&gt;" in text
    assert "&lt;u&gt;3.41 GB of pixels" in text
    assert text.count("&lt;s&gt;stem&lt;/s&gt;-00000.parquet:7<") == 2
    assert "<u>" not in text and "<s>" not in text
    assert "alert(1)</script>" in _Page(text).text
    assert html_of(examples()).split("<script>")[1] == text.split("<script>")[1]


def test_headline_of_a_clear_winner(examples: Copy) -> None:
    folder = examples()
    result = folder.result()
    assert result is not None
    page = page_of(folder)
    assert f"{result.winner} is clearly better than the base model." in page.text
    assert "NOT clearly" not in page.text
    assert "3 of 13 cannot be told apart from the winner; the cheapest of them is" in page.text
    assert "Against the experiment's own recipe (trial_000) it is clearly better" in page.text
    assert "Report split touched 3 times" in page.text
    assert "2 h 05 min" in page.text
    roles = [station.role for station in headline(load_view(folder.root)).stations]
    assert roles == ["base", "default", "winner"]


def test_unclear_winner_is_said_plainly(examples: Copy) -> None:
    page = page_of(examples(state="unclear"))
    assert "is NOT clearly better than the base model." in page.text
    assert "The interval includes 0" in page.text


@pytest.mark.parametrize(
    ("mode", "lower", "upper", "tone"),
    [
        ("max", 0.1, 0.2, "good"),
        ("max", -0.1, 0.2, "unclear"),
        ("max", -0.2, -0.1, "bad"),
        ("min", -0.2, -0.1, "good"),
        ("min", -0.1, 0.2, "unclear"),
        ("min", 0.1, 0.2, "bad"),
        ("max", float("nan"), float("nan"), "unclear"),
        ("max", 0.0, 0.2, "unclear"),
    ],
)
def test_clearly_follows_the_mode(mode: str, lower: float, upper: float, tone: str) -> None:
    middle = (lower + upper) / 2
    assert clearly(PairedTest("m", "a", "b", middle, lower, upper, 0.5, 9), mode) == tone


def test_a_test_told_the_other_way_round_is_turned(copy: Copy) -> None:
    folder = copy()
    result = folder.result()
    assert result is not None
    test = result.paired[0]
    turned = replace(
        test,
        first="base",
        second="winner",
        difference=-test.difference,
        lower=-test.upper,
        upper=-test.lower,
    )
    write_json(folder.result_file, replace(result, paired=[turned]))
    view = load_view(folder.root)
    found = view.against("base")
    assert found is not None
    assert (found.lower, found.upper) == (test.lower, test.upper)
    assert headline(view).tone == "good"


def test_running_sweep_names_no_winner(examples: Copy) -> None:
    page = page_of(examples(state="running"))
    assert "The sweep is running: no winner has been chosen." in page.text
    assert "16 of 16 planned trials so far" in page.text
    assert "clearly better" not in page.text
    assert "No answers on the report split yet" in page.text


def test_a_single_training_run_claims_nothing(copy: Copy) -> None:
    """`raytune-vlm train` leaves a folder without a search space and without a decision."""
    folder = copy(state="single")
    folder.result_file.unlink()
    head = read_json(folder.experiment_file)
    head["experiment"]["sweep"]["search_space"] = {}
    write_json(folder.experiment_file, head)
    found = headline(load_view(folder.root))
    assert (found.status, found.verdict) == (
        "finished",
        "A single training run: nothing is compared.",
    )
    assert page_of(folder)


def test_empty_sweep(examples: Copy) -> None:
    folder = examples(state="empty")
    page = page_of(folder)
    assert "0 of 16 planned trials so far: none started." in page.text
    assert read_json(folder.report / "leaderboard.json")["rows"] == []
    assert (folder.report / "leaderboard.csv").read_text().startswith("rank,trial_id,")


@pytest.mark.parametrize("mode", ["max", "min"])
def test_leaderboard_is_sorted_best_first_and_failed_last(examples: Copy, mode: str) -> None:
    view = load_view(examples(mode=mode).root)
    rows = leaderboard(view)
    values = [row.cells[view.metric].best.value for row in rows if row.record.status != "failed"]
    assert values == sorted(values, reverse=mode == "max")
    assert rows[0].roles == ("winner",)
    assert [row.record.status for row in rows[-2:]] == ["failed", "failed"]
    ranks = [row.rank for row in rows]
    assert [rank for rank in ranks if rank] == list(range(1, 15))
    base = next(row for row in rows if row.roles == ("base",))
    assert base.rank is None and base.record.recipe == {}


def test_best_and_last_rung_may_differ(copy: Copy) -> None:
    folder = copy()
    file = folder.trial("trial_000").evaluation("select", 50) / "scores.json"
    plain = read_json(file)
    plain["metrics"]["nted@donut"]["value"] = 0.81234
    write_json(file, plain)
    row = next(r for r in leaderboard(load_view(folder.root)) if r.trial_id == "trial_000")
    cell = row.cells["nted@donut"]
    assert (cell.best_step, cell.last_step) == (50, 400)
    assert "at step 50; last" in page_of(folder).text


@pytest.mark.parametrize("mode", ["max", "min"])
def test_csv_and_json_hold_the_same(examples: Copy, mode: str) -> None:
    folder = examples(mode=mode)
    html_of(folder)
    document = read_json(folder.report / "leaderboard.json")
    with (folder.report / "leaderboard.csv").open(newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert document["mode"] == mode
    assert len(lines) == len(document["rows"]) == 17
    for line, row in zip(lines, document["rows"], strict=True):
        assert list(line) == list(row)
        for name, value in row.items():
            assert line[name] == ("" if value is None else str(value)), name
    assert {"lora.rank", "train.learning_rate", "lora.scope"} <= set(lines[0])


def test_leaderboard_files_are_strict_json(copy: Copy) -> None:
    folder = copy(state="single")
    file = folder.trial("trial_000").evaluation("select", 400) / "scores.json"
    plain = read_json(file)
    plain["metrics"]["nted@donut"] |= {"lower": float("nan"), "upper": float("nan")}
    write_json(file, plain)
    build_report(folder.root)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((folder.report / "leaderboard.json").read_text(), parse_constant=refuse)


def test_same_folder_gives_the_same_page(examples: Copy) -> None:
    assert build_report(examples().root).read_text(encoding="utf-8") == html_of(examples())


def test_plots_cover_every_varied_key(examples: Copy) -> None:
    view = load_view(examples().root)
    wide, panels = space_plots(view)
    assert [plot.title for plot in wide] == ["Rank and learning rate"]
    assert [plot.title for plot in panels] == view.varied_keys
    assert all(plot.note == "n = 15" for plot in panels)
    titles = [plot.title for plot in learning_curves(view)]
    assert titles == ["Score on select by step", "Training loss by step"]


def test_any_search_space_can_be_drawn(copy: Copy) -> None:
    """Conditional keys, truth values, texts with dollar signs, integers without a distribution."""
    folder = copy()
    for number, file in enumerate(sorted(folder.root.glob("trials/*/trial.json"))):
        if file.parent.name == "base":
            continue
        plain = read_json(file)
        plain["recipe"] = {"lora.dora": number % 2 == 0, "note": f"$x_{number % 3}$ & <b>"}
        plain["recipe"] |= {"train.warmup_steps": number * 7} if number % 3 else {}
        write_json(file, plain)
    view = load_view(folder.root)
    wide, panels = space_plots(view)
    assert wide == []
    assert [plot.title for plot in panels] == ["lora.dora", "note", "train.warmup_steps"]
    assert "$x_0$ & <b>" in page_of(folder).text


def test_gallery_opens_with_every_kind(examples: Copy) -> None:
    exhibits = gallery(load_view(examples().root))
    assert len(exhibits) == 12
    kinds = [exhibit.change for exhibit in exhibits[:4]]
    assert kinds == ["improved", "improved", "worse", "both right"]
    assert all((e.image or "").startswith("data:image/jpeg;base64,") for e in exhibits)


def test_gallery_shows_a_reference_with_several_answers(copy: Copy) -> None:
    folder = copy()
    for file in folder.root.glob("trials/*/evaluations/report/*/predictions.parquet"):
        table = pyarrow.parquet.read_table(file)
        answers = [json.dumps({"answers": ["a cat", "cat", "cat"]})] * len(table)
        for name, cells in (("reference", answers), ("prediction", ["cat "] * len(table))):
            table = table.set_column(table.column_names.index(name), name, [cells])
        pyarrow.parquet.write_table(table, file)
    exhibit = gallery(load_view(folder.root))[0]
    assert (exhibit.truth.text, exhibit.winner.mark) == ("a cat | cat", "right")


def test_gallery_reads_only_pictures_of_the_gallery(copy: Copy) -> None:
    folder = copy()
    view = load_view(folder.root)
    first = gallery(view)[0].sample_id
    write_text(folder.gallery / f"{first}.jpg", "not a picture")
    assert gallery(view)[0].image is None
    (folder.gallery / f"{first}.jpg").unlink()
    assert first not in [exhibit.sample_id for exhibit in gallery(view)]
    shutil.rmtree(folder.gallery)
    assert all(exhibit.image is None for exhibit in gallery(view))
    assert "no image stored" in page_of(folder).text


def test_tree_marks_wrong_missing_and_extra_fields() -> None:
    truth = {"menu": [{"nm": "TEA", "price": "5"}, {"nm": "BUN"}], "total": "9"}
    answer = {"menu": {"nm": "TEA", "price": "6"}, "tax": "1"}
    lines = compare(answer, truth)
    assert [(line.key, line.value, line.mark) for line in lines] == [
        ("menu", None, ""),
        ("nm", "TEA", "right"),
        ("price", "6", "wrong"),
        ("menu", None, "missing"),
        ("nm", "BUN", "missing"),
        ("total", "9", "missing"),
        ("tax", "1", "extra"),
    ]
    same = compare(token2json(json2token(truth)), token2json(json2token(truth)))
    assert {line.mark for line in same} <= {"", "right"}
    assert [line.depth for line in tree_of({"a": {"b": ["x", "y"]}})] == [0, 1, 1]


def test_what_the_statistics_found_is_told(examples: Copy) -> None:
    text = page_of(examples()).text
    assert "With other seeds 0.861 ± 0.011" in text
    assert "NOT the best by the mean: trial_007 has 0.881" in text
    assert "Without overlap 0.851 winner on the 34 report samples" in text
    assert "Detectable difference 0.104" in text and "on select 0.071" in text
    assert "p = 0.001 after Holm for 3 tests" in text
    assert "McNemar p = 0.146" in text and "9 : 3" in text
    assert "Every trial against the base model on select (14 tests)" in text
    assert "trial_007 best mean" in text


def test_data_and_audit_are_told(examples: Copy) -> None:
    folder = examples()
    page = page_of(folder)
    assert page.text.count("balances") == 3
    assert "train 819 790 7 3 19 balances" in page.text
    assert "train 790 790 977.4 703.7 72 % 164.2 16.8 % 1,792 14 1.77 %" in page.text
    assert "select 100 100 899.9 647.9 72 % \u2013 1,710 0" in page.text
    assert "data.max_length = 1,792: a longer training sample is cut" in page.text
    assert "(3.41 GB of pixels, within 212 GB of free disk)" in page.text
    assert "Images pixels prepared as the model takes them" in page.text
    assert "Samples cached read from the memory-mapped store" in page.text
    assert "report train 6 of 40 (15 %): same image 1, nearly the same image 5" in page.text
    assert "report select 2 of 40 (5 %): same group 2" in page.text
    assert "image is truncated cord-v2/train-00000.parquet:7 3 " in page.text
    assert page.text.count("cord-v2/train-00000.parquet:7 ") == 2
    assert "59 checks passed, 1 failed." in page.text


def histograms_of(page: _Page) -> list[tuple[str, str]]:
    """The alternative text of every histogram of lengths, and its picture as SVG."""
    images = [(a["alt"] or "", a["src"] or "") for tag, a in page.tags if tag == "img"]
    found = [pair for pair in images if pair[0].startswith("Histogram of the lengths")]
    return [(alt, base64.b64decode(uri.partition(",")[2]).decode()) for alt, uri in found]


def test_lengths_are_drawn_for_every_split(examples: Copy) -> None:
    drawn = histograms_of(page_of(examples()))
    assert [alt.split()[8] for alt, _ in drawn] == ["train", "select", "report"]
    assert "between 821 and 896, the mean is 977, the longest 1,792." in drawn[0][0]
    for _, picture in drawn:
        words = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
        assert {"tokens", "samples", "mean", "data.max_length", "1,200"} <= set(words)
        bars = re.findall(r'<path d="([^"]+)" clip-path[^>]*style="fill: #b4bfcb', picture)
        assert len(bars) == 24


def test_any_manifest_can_be_shown(copy: Copy) -> None:
    """Splits of any name or without samples, a torn histogram, more reasons than are listed."""
    folder = copy(state="single")
    plain = read_json(folder.manifest_file)
    train, select, report = (plain["splits"][name] for name in ("train", "select", "report"))
    report["length_edges"].pop()
    nothing = {name: [] if isinstance(value, list) else 0 for name, value in select.items()}
    plain["splits"] = {'"><b>': train, "select": nothing, "report": report}
    plain["quarantine_reasons"] = {f"exact duplicate of {n}": n for n in range(30, 17, -1)}
    plain |= {"tier": "encoded", "tier_reason": "4 GB of pixels, more than data.disk_budget_gb=1"}
    write_json(folder.manifest_file, plain)
    page = page_of(folder)
    assert [alt.split(" in tokens")[0][-5:] for alt, _ in histograms_of(page)] == ['"><b>']
    assert "select 0 0 \u2013 \u2013 \u2013 \u2013 0 " in page.text
    assert "exact duplicate of 21 21 3 more reasons 57 " in page.text
    assert "Images encoded the files as they came, decoded by threads" in page.text
    assert "(4 GB of pixels, more than data.disk_budget_gb=1)" in page.text


def test_a_manifest_of_an_earlier_version(copy: Copy) -> None:
    """What it did not record is told as missing, and its overlap in the meaning that it had."""
    folder = copy(state="single")
    plain = read_json(folder.manifest_file)
    del plain["tier"], plain["tier_reason"]
    for entry in plain["splits"].values():
        entry["num_seen"] -= entry["num_duplicates"]
        for name in list(entry)[9:]:
            del entry[name]
    plain["overlap"] = {"train/report": 0, "select/report": 2}
    write_json(folder.manifest_file, plain)
    page = page_of(folder)
    assert "train 800 790 7 3 \u2013 balances" in page.text
    assert "train 790 790 977.4 \u2013 164.2 16.8 % 1,792 \u2013" in page.text
    assert histograms_of(page) == []
    assert "How batches are made" not in page.text
    assert "report train none report select 2 groups or samples" in page.text


def test_an_account_that_does_not_balance_is_told(copy: Copy) -> None:
    folder = copy(state="single")
    plain = read_json(folder.manifest_file)
    plain["splits"]["train"]["num_duplicates"] -= 1
    write_json(folder.manifest_file, plain)
    page = page_of(folder)
    assert (page.text.count("does not add up"), page.text.count("balances")) == (1, 2)


def test_provenance(examples: Copy) -> None:
    folder = examples()
    page = page_of(folder)
    header = read_json(folder.experiment_file)
    assert header["command"] in page.text
    assert header["fingerprint"] in page.text
    assert "learning_rate: 0.001" in page.text


def test_not_a_sweep_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        build_report(tmp_path)
    assert error.value.message == f"{tmp_path} is not a sweep folder: no experiment.json"


def test_unreadable_parts_become_notes(copy: Copy) -> None:
    folder = copy()
    write_text(folder.manifest_file, "{")
    write_text(folder.trial("trial_002").record_file, '{"unknown": 1}')
    with folder.trial("trial_003").metrics_file.open("a") as stream:
        stream.write('{"step": 405, "lo')
    view = load_view(folder.root)
    assert len(view.trials) == 15
    assert [note.split(" cannot")[0] for note in view.notes] == [
        "trials/trial_002/trial.json",
        "data/manifest.json",
    ]
    logged = next(trial for trial in view.trials if trial.trial_id == "trial_003").logs
    assert logged[-1]["step"] == read_json_lines(folder.trial("trial_003").metrics_file)[-1]["step"]
    assert "trials/trial_002/trial.json cannot be read" in page_of(folder).text


@pytest.mark.parametrize("mode", ["max", "min"])
def test_model_card(examples: Copy, mode: str) -> None:
    card = model_card(examples(mode=mode))
    _, front, text = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert matter["library_name"] == "peft"
    metrics = matter["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["type"] == ("nted" if mode == "max" else "cer")
    assert "PeftModel.from_pretrained" in text
    for heading in ("Scores on untouched data", "Recipe", "How to load it", "Limits", "Reproduce"):
        assert f"\n## {heading}\n" in text
    assert "3 other trials cannot be told apart" in text
    assert "touched 3 times" in text


def test_model_card_code_compiles(copy: Copy) -> None:
    folder = copy(state="single")
    for name in ("demo", "Qwen/Qwen2.5-VL-3B-Instruct"):
        head = read_json(folder.experiment_file)
        head["experiment"]["model"] |= {"name": name, "revision": "abc"}
        write_json(folder.experiment_file, head)
        code = model_card(folder).split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert ("DEMO_BASE" in code) is (name == "demo")
        assert "revision='abc', dtype='bfloat16'" in code


def test_model_card_names_the_teacher(copy: Copy) -> None:
    folder = copy(state="single")
    assert "Its other target" not in model_card(folder)
    for weight in (0.25, 0):
        head = read_json(folder.experiment_file)
        taught = {"teacher": "org/large", "adapter": None, "weight": weight, "temperature": 2.0}
        head["experiment"].setdefault("train", {})["distillation"] = taught
        write_json(folder.experiment_file, head)
        told = "distribution of `org/large`: weight 0.25, temperature 2." in model_card(folder)
        assert told is (weight > 0)


def test_model_card_needs_a_winner_and_tells_an_unclear_one(examples: Copy) -> None:
    with pytest.raises(DataError, match="no winner yet"):
        model_card(examples(state="running"))
    assert "is NOT clearly better than the base model.**" in model_card(examples(state="unclear"))


def test_numbers_as_people_read_them() -> None:
    assert [recipe_value(v) for v in (1e-3, 3.2e-4, 0.05, 16, True, "text", 0.0, None)] == [
        *("1e-3", "3.2e-4", "0.05", "16", "true", "text", "0", "\u2013")
    ]
    spoken = [duration(s).replace("\u00a0", " ") for s in (0, 0.5, 9.4, 59.7, 119.8, 7512, 86400)]
    assert spoken == ["0 s", "500 ms", "9.4 s", "59.7 s", "2 min 00 s", "2 h 05 min", "24 h 00 min"]


def test_the_seeds_by_which_a_recipe_was_picked_are_told(examples: Copy, tmp_path: Path) -> None:
    folder = SweepFolder(shutil.copytree(examples().root, tmp_path / "copy"))
    assert "Over its seeds" not in {label for label, _, _ in headline(load_view(folder.root)).facts}
    result = folder.result()
    assert result is not None
    scores = {result.winner: 0.9, "trial_001": 0.7, "trial_002": 0.8}
    write_json(folder.result_file, replace(result, seeds_of_winner=scores, replicates=[]))
    facts = {label: (value, why) for label, value, why in headline(load_view(folder.root)).facts}
    value, why = facts["Over its seeds"]
    assert value == "0.800 ± 0.100" and "with its 3 seeds" in why and result.winner in why
    assert "picked by the mean over 3 seeds, 0.800 ± 0.100" in model_card(folder)


def test_report_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, raytune_vlm.report, raytune_vlm.report.model_card;"
        "print([m for m in ('torch', 'ray', 'transformers', 'matplotlib.pyplot')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_spread_over_seeds_is_shown(tmp_path: Path) -> None:
    folder = build_example(tmp_path, mode="max", state="finished")
    page = build_report(folder.root).read_text(encoding="utf-8")
    assert "With other seeds" in page
    assert "again with 2 other seeds, on select; 1 failed" in page or "; 1 failed" in page
