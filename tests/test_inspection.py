"""`raytune-vlm data`: types are told, samples shown as the model sees them, bad rows counted."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from made import cli_command, cli_environment, picture, run_cli, turn, write_data
from PIL import Image
from rich.console import Console
from test_cli import PROBE, refused, refused_here

from raytune_vlm.cli import cli
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.inspection import columns, page, terminal
from raytune_vlm.inspection.lengths import bars, histogram, padding_waste, spread
from raytune_vlm.inspection.pictures import given_images
from raytune_vlm.inspection.rows import open_encoder
from raytune_vlm.inspection.sample_view import SampleView, view_of
from raytune_vlm.inspection.target import resolve_target
from raytune_vlm.inspection.text import TIMES, middle_out
from raytune_vlm.inspection.tokens import count_image_tokens, pieces_of
from raytune_vlm.records import Quarantined
from raytune_vlm.sources import SOURCES
from raytune_vlm.sources.containers import CONTAINERS
from raytune_vlm.visible import visible

FAMILIES = ("demo", "idefics3", "qwen2_5_vl", "gemma3")


def run(*arguments: object, status: int = 0) -> Result:
    """`raytune-vlm data ...` in this process."""
    result = CliRunner().invoke(cli, ["data", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def model_of(tiny_model):
    return lambda family: "demo" if family == "demo" else str(tiny_model(family))


@pytest.fixture
def encoder_of(model_of):
    return lambda family, **options: open_encoder(ModelConfig(name=model_of(family)), **options)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [turn("user", question), turn("assistant", answer)], **columns}


def sharegpt(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    pair = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": pair, **columns}


# What the command line promises


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["validate", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "data", *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout[-300:]


def test_wrong_use_is_one_line_and_status_2(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"id": 1, "photo": "x.png", "caption": "x"}])
    message = refused("data", "inspect", tmp_path)
    assert "train.jsonl has the columns id, photo, caption" in message
    assert "image + text (image_text)" in message and "from/value (sharegpt)" in message
    assert "--type NAME" in message
    assert "did you mean 'train.jsonl'" in refused_here("data", "stats", tmp_path / "trian.jsonl")
    assert "did you mean 'sharegpt'" in refused_here(
        "data", "stats", tmp_path, "--type", "sharegtp"
    )
    assert "a glob goes in quotes" in refused_here("data", "validate", tmp_path, "other.jsonl")
    there = [tmp_path, "--type", "image_text"]
    assert "did you mean 'max_length'" in refused_here("data", "stats", *there, "data.max_lenth=9")
    assert "there is no folder" in refused_here(
        "data", "inspect", *there, "--html", "/no/such/x.html"
    )
    assert "did you mean 'demo'" in refused("data", "inspect", *there, "--model", "dmeo")
    assert "allow_network" in refused_here("data", "inspect", "hf://datasets/a/b")


def test_validate_ends_with_1_where_rows_are_bad(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", ""), chat("q", "b")])
    done = run_cli("data", "validate", file, "--no-tokens", check=False)
    assert done.returncode == 1 and "seen 3 = good 2 + bad 1" in done.stdout, done.stderr
    run("validate", file, "--no-tokens", "--max-bad-fraction", 0.4)
    run("validate", file, "--no-tokens", "data.max_bad_fraction=0.4")
    run("validate", file, "--no-tokens", "--limit", 1)


def test_an_empty_target_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no row" in refused_here("data", "stats", tmp_path / "empty.jsonl")
    assert "there is no row" in refused_here("data", "stats", tmp_path, "--type", "messages")
    (tmp_path / "empty.jsonl").unlink()
    assert "no data file (.jsonl" in refused_here("data", "stats", tmp_path)
    picture(0).save(tmp_path / "a.png")
    assert "no supported suffix (.jsonl" in refused_here("data", "stats", tmp_path / "a.png")


# Types


def table(file: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file)


def receipts(folder: Path) -> None:
    for name in ("img", "box"):
        (folder / name).mkdir()
    picture(0).save(folder / "img" / "1.png")
    (folder / "box" / "1.csv").write_text("2,2,40,2,40,20,2,20,9.00\n")


def saved_dataset(folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([chat("q", "a")]).save_to_disk(folder / "saved")
    for file in (folder / "saved").iterdir():
        file.rename(folder / file.name)


def llamafactory(folder: Path) -> None:
    entry = {"file_name": "a.json", "formatting": "sharegpt"}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (folder / "a.json").write_text(json.dumps([sharegpt("q", "a")]))


def document(folder: Path) -> None:
    picture(0).save(folder / "a.pdf")
    write_rows(folder / "a.jsonl", [{"file": "a.pdf", "page": 1, **chat("q", "a")}])


def webdataset(folder: Path) -> None:
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        (folder / "0.txt").write_text("a")
        for name in ("0.png", "0.txt"):
            tar.add(folder / name, name)


FORMS: dict[str, tuple[Any, str]] = {
    "messages": (
        lambda at: write_rows(at / "a.jsonl", [chat("q", "a")]),
        "messages (column messages)",
    ),
    "messages by another name": (
        lambda at: table(at / "a.parquet", [{"chat": chat("q", "a")["messages"]}]),
        "messages (column chat)",
    ),
    "sharegpt": (
        lambda at: (at / "a.json").write_text(json.dumps([sharegpt("q", "a", images=[])])),
        "sharegpt (columns conversations, images)",
    ),
    "sharegpt with one image, zipped": (
        lambda at: (at / "a.jsonl.gz").write_bytes(
            gzip.compress(json.dumps(sharegpt("q", "a", image=[])).encode())
        ),
        "sharegpt (columns conversations, image)",
    ),
    "messages under the other name": (
        lambda at: write_rows(at / "a.jsonl", [{"conversations": chat("q", "a")["messages"]}]),
        "messages (column conversations)",
    ),
    "image_text": (
        lambda at: table(at / "a.parquet", [{"image": "0.png", "text": "x", "id": 1}]),
        "image_text (columns image, text)",
    ),
    "cord": (
        lambda at: table(
            at / "a.parquet", [{"image": "0.png", "ground_truth": '{"gt_parse": {"a": "b"}}'}]
        ),
        "cord (columns image, ground_truth)",
    ),
    "sroie": (receipts, "sroie (a folder with img/, box/)"),
    "prompt_completion": (
        lambda at: write_rows(at / "a.jsonl", [{"prompt": "q", "completion": "a", "images": []}]),
        "prompt_completion (columns prompt, completion, images)",
    ),
    "prompt_completion with turns": (
        lambda at: write_rows(
            at / "a.jsonl",
            [{"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]}],
        ),
        "prompt_completion (columns prompt, completion)",
    ),
    "messages saved to disk": (saved_dataset, "messages (column messages)"),
    "llamafactory": (llamafactory, "llamafactory (a folder with dataset_info.json)"),
    "pdf": (document, "pdf (columns file, page, messages)"),
    "webdataset": (webdataset, "webdataset (suffix .tar)"),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_type_is_told_from_the_files(form, tmp_path):
    write, expected = FORMS[form]
    picture(0).save(tmp_path / "0.png")
    write(tmp_path)
    output = run("validate", tmp_path, "--no-tokens").stdout
    assert f"read as: {expected}\n" in output and "seen 1 = good 1 + bad 0" in output


def test_every_container_is_looked_into():
    assert set(columns.SUFFIXES) == set(CONTAINERS)


def test_every_type_of_the_table_can_be_told():
    told = {form.split()[0] for form in FORMS}
    assert set(SOURCES) - told == {"python", "table"}


def test_every_type_of_the_table_can_be_given(tmp_path):
    for name in SOURCES:
        try:
            resolve_target(str(tmp_path), type_name=name, model=None)
        except ValueError as error:  # a type may need more than a path: then its key is named
            assert "data.sources.0" in str(error)


def test_what_fits_two_types_is_refused_with_both(tmp_path):
    row = {"image": "x.png", "text": "t", "ground_truth": "{}"}
    file = write_rows(tmp_path / "a.jsonl", [row])
    message = refused_here("data", "validate", file)
    assert "image_text (columns image, text) and cord (columns image, ground_truth)" in message
    both = {**chat("q", "a"), **sharegpt("q", "a")}
    message = refused_here("data", "validate", write_rows(file, [both]))
    assert "messages (column messages)" in message and "sharegpt (column conv" in message
    assert "seen 1 = good 1" in run("validate", file, "--no-tokens", "--type", "sharegpt").stdout


def test_files_of_a_folder_have_types_of_their_own_and_others_are_left_out(tmp_path):
    write_rows(tmp_path / "a.jsonl", [chat("q", "a")] * 2)
    write_rows(tmp_path / "b.jsonl", [sharegpt("q", "b")])
    (tmp_path / "c.json").write_text('{"settings": 1}')
    output = run("validate", tmp_path, "--no-tokens").stdout
    assert "read as: messages (column messages), 1 file\n" in output
    assert "read as: sharegpt (column conversations), 1 file\n" in output
    assert "left out: c.json holds an object, not a list of rows" in output
    assert "seen 3 = good 3" in output and "a.jsonl:2 repeats a.jsonl:1" in output
    assert "seen 2 = good 2" in run("validate", tmp_path / "a*.jsonl", "--no-tokens").stdout


def test_overrides_reach_the_data_and_the_source(tmp_path):
    picture(0).save(tmp_path / "0.png")
    file = write_rows(tmp_path / "a.jsonl", [{"photo": "0.png", "text": "hello"}])
    options = ["--type", "image_text", "data.sources.0.image_column=photo"]
    output = run("inspect", file, *options, "data.sources.0.instruction=say").stdout
    assert "say" in output and "⟦hello" in output
    output = run("stats", file, *options, "data.max_length=8").stdout
    assert "1 (100 %) longer than 8 tokens" in output


# Samples as the model sees them


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answers_and_nothing_else(family, encoder_of):
    encoder = encoder_of(family)
    talk = [
        turn("user", "what is it?", images=1),
        turn("assistant", "an egg"),
        turn("user", "sure?"),
        turn("assistant", "quite\nso"),
    ]
    encoded = encoder.training(talk, [picture(0, 100, 80)])
    pieces = pieces_of(encoded, encoder.processor)
    decode = encoder.processor.tokenizer.decode
    spans = [decode(encoded.input_ids[start:end]) for start, end in encoded.spans]
    runs, inside = [], False
    for piece in pieces:
        if piece.labelled and not inside:
            runs.append("")
        if piece.labelled:
            runs[-1] += piece.text
        inside = piece.labelled
    assert runs == spans and runs[0].startswith("an egg") and runs[1].startswith("quite\nso")
    unlabelled = "".join(piece.text for piece in pieces if not piece.labelled)
    assert "what is it?" in unlabelled and "sure?" in unlabelled and "egg" not in unlabelled
    assert sum(piece.num_tokens for piece in pieces) == len(encoded.input_ids)
    image = [piece for piece in pieces if piece.kind == "image"]
    assert len(image) == 1 and image[0].text.endswith(f"×{image[0].num_tokens}")  # noqa: RUF001


def test_what_a_text_encoder_reads_is_shown_ahead_of_the_answer(encoder_of):
    encoder = encoder_of("florence2")
    talk = [turn("user", "what is it?", images=1), turn("assistant", "an egg")]
    pieces = pieces_of(encoder.training(talk, [picture(0, 100, 80)]), encoder.processor)
    read, _, written = "".join(piece.text for piece in pieces).partition(" → ")
    assert read == "<image>×5<s>what is it?</s>"  # noqa: RUF001
    assert written == "</s><s>an egg</s>"
    assert "".join(piece.text for piece in pieces if piece.labelled) == "<s>an egg</s>"


@pytest.mark.parametrize(
    ("family", "size", "tokens"),
    [("idefics3", "64 × 64", 16), ("qwen2_5_vl", "84 × 112", 12), ("gemma3", "56 × 56", 4)],  # noqa: RUF001
)
def test_images_are_shown_as_the_model_gets_them(family, size, tokens, encoder_of):
    encoder = encoder_of(family)
    smooth = picture(1, 4, 3).resize((192, 152))
    blank = picture(2, 1, 1).resize((190, 150))
    talk = [turn("user", "two", images=2), turn("assistant", "b")]
    encoded = encoder.training(talk, [smooth, blank])
    pieces = pieces_of(encoded, encoder.processor)
    given = given_images(encoded, encoder.processor, pieces, 2)
    assert [entry.size for entry in given] == [size] * 2
    assert [entry.num_tokens for entry in given] == [tokens] * 2
    assert count_image_tokens(encoded, encoder.processor) == 2 * tokens
    for image, entry in zip((smooth, blank), given, strict=True):
        height, width = entry.pixels.shape[:2]
        expected = np.asarray(image.resize((width, height)), dtype=int)
        assert np.abs(expected - entry.pixels).mean() < 3


def test_images_of_any_size_are_shown_as_the_processor_resized_them(encoder_of):
    encoder = encoder_of("qwen2_5_vl")
    image = picture(3, 130, 90)
    encoded = encoder.training([turn("user", "q", images=1), turn("assistant", "a")], [image])
    given = given_images(encoded, encoder.processor, pieces_of(encoded, encoder.processor), 1)[0]
    height, width = given.pixels.shape[:2]
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    assert np.array_equal(given.pixels, np.asarray(resized))
    assert given.size == f"{height} {TIMES} {width}"


def test_tiles_lie_in_their_rows_and_columns(encoder_of):
    encoder = encoder_of("idefics3")
    encoder.processor.image_processor.do_image_splitting = True
    size = type(encoder.processor.image_processor.size)
    encoder.processor.image_processor.size = size(longest_edge=128)
    wide, tall = picture(4, 4, 2).resize((256, 128)), picture(5, 2, 4).resize((128, 256))
    talk = [turn("user", "row_9_col_9", images=2), turn("assistant", "b")]
    encoded = encoder.training(talk, [wide, tall])
    pieces = pieces_of(encoded, encoder.processor)
    first, second = given_images(encoded, encoder.processor, pieces, 2)
    assert first.size == second.size == "3 tiles of 64 × 64"  # noqa: RUF001
    assert first.num_tokens == second.num_tokens == 48
    assert first.pixels.shape[0] == 64 and second.pixels.shape[0] == 2 * 64 + 4
    tiles = np.concatenate([second.pixels[:64, :64], second.pixels[68:, :64]])
    expected = np.asarray(tall.resize((64, 128)), dtype=int)
    assert np.abs(expected - tiles).mean() < 3


@pytest.mark.parametrize("family", ["demo", "qwen2_5_vl"])
def test_inspect_shows_bad_rows_in_place_and_prompts_as_prompts(family, model_of, tmp_path):
    write_data(tmp_path / "data", num_train=3, num_other=2)
    train = tmp_path / "data" / "train.jsonl"
    train.write_text("{broken\n" + train.read_text())
    sources = [
        {"type": "messages", "path": "train.jsonl", "split": "train", "max_samples": 2},
        {"type": "messages", "path": "report.jsonl", "split": "report"},
    ]
    file = tmp_path / "x.yaml"
    plain = {"name": "x", "data": {"root": str(tmp_path / "data"), "sources": sources}}
    file.write_text(yaml.safe_dump(plain))
    html = tmp_path / "x.html"
    output = run("inspect", file, "--model", model_of(family), "--html", html).stdout
    bad, train_part, report_part = re.split(r"\n[123]  ", output)[1:]
    assert bad.startswith("train.jsonl:1") and "cannot be used: malformed JSON" in bad
    answer = re.findall("⟦(.*?)⟧", train_part, re.DOTALL)
    assert len(answer) == 1 and answer[0].startswith("tea<") and "1 turn" not in train_part
    assert "read" in train_part.replace(answer[0], "") and "split train" in train_part
    assert "48 × 48 in the file" in train_part and "the model gets" in train_part  # noqa: RUF001
    assert "⟦" not in report_part and "reference: tea" in report_part
    text = html.read_text()
    assert text.count('<section class="sample') == 3 and text.count('"sample refused"') == 1
    assert text.count('src="data:image/') == 4
    samples = text[text.index("<section") :]
    labelled = "".join(re.findall(r'<span class="labelled">(.*?)</span>', samples))
    assert "tea" in labelled and "read" not in labelled


def test_colours_mark_labels_on_a_terminal_and_brackets_without(encoder_of, tmp_path):
    write_data(tmp_path / "data", num_train=1, num_other=1)
    run("inspect", tmp_path / "data" / "train.jsonl")
    view = _first_view(tmp_path / "data" / "train.jsonl", encoder_of("demo"))

    def shown(**options: Any) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, highlight=False, **options)
        terminal.show_sample(console, view)
        return console.file.getvalue()

    coloured = shown(color_system="standard")
    assert "\x1b[32mtea\x1b[0m" in coloured and "\x1b[2mread\x1b[0m" in coloured
    assert "⟦" not in coloured
    assert "⟦" in shown(color_system="standard", no_color=True)
    assert "⟦" in shown(color_system=None)


def _first_view(file: Path, encoder: Any) -> SampleView:
    from raytune_vlm.inspection.rows import read_rows

    target = resolve_target(str(file), type_name=None, model=None)
    row = next(read_rows(target.experiment, encoder, lambda done, total: None))
    limits = target.experiment.data.image_limits
    view = view_of(row, 1, encoder, max_length=2048, limits=limits, pictures=False)
    assert isinstance(view, SampleView)
    return view


# Nothing of the data may steer a terminal or a page

NASTY = "<script>alert(1)</script>\x1b[2J\x9b31m\x07\u202edcba\u2066 &amp; [bold]x[/bold]"


def test_nasty_text_reaches_neither_terminal_nor_page(tmp_path, model_of):
    folder = tmp_path / "d\x1b[31m<i>"
    folder.mkdir()
    rows = [chat(NASTY, NASTY, group_id=NASTY), {"messages": [{"role": NASTY, "content": "x"}]}]
    write_rows(folder / "a<b>\x1b[1m.jsonl", rows)
    (folder / "c\x1b.json").write_text("{}")
    html = tmp_path / "x.html"
    output = run("inspect", folder, "--html", html, "--model", model_of("qwen2_5_vl")).output
    output += run("stats", folder, "--html", tmp_path / "s.html").output
    output += run("validate", folder, status=1).output
    page_text = html.read_text() + (tmp_path / "s.html").read_text()
    for text in (output, page_text):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", text)
    assert "␛[2J" in output and "\\u202e" in output and "[bold]x[/bold]" in output
    assert "<script" not in page_text and "&lt;script&gt;" in page_text and "<i>" not in page_text
    assert "&amp;amp;" in page_text


def test_the_pages_forbid_scripts_and_requests(tmp_path):
    from raytune_vlm.report.html import POLICY

    assert POLICY.replace("script-src 'sha256-{digest}'; ", "") == page.POLICY
    write_data(tmp_path / "data", num_train=4, num_other=1)
    html = tmp_path / "s.html"
    run("stats", tmp_path / "data" / "train.jsonl", "--html", html)
    text = html.read_text()
    assert page.POLICY.replace("'", "&#39;") in text
    assert "http://" not in text and "https://" not in text
    assert text.count("<rect") >= 1 and "<svg" in text and " on" not in re.sub(">[^<]*<", "", text)


def test_text_helpers():
    assert visible("a\x1b[0m\tb\nc\r\udc80") == "a␛[0m\tb\nc␍\\udc80"
    assert visible("प्‍र é 漢 👩‍👩‍👧") == "प्‍र é 漢 👩‍👩‍👧"
    assert middle_out("x" * 100, 40) == f"{'x' * 30} […60 characters left out…] {'x' * 10}"


def test_refusals_that_differ_by_names_and_numbers_are_of_one_kind():
    def kind(reason):
        return Quarantined("a.jsonl:1", reason, "train").kind

    assert kind("image not found: a/b-1.png") == kind("image not found: c.jpg")
    assert kind("turn 1 (user) is empty") == kind("turn 3 (user) is empty")
    assert kind("image not found: c.jpg") != kind("image is null")


def test_output_that_cannot_hold_the_characters_is_no_crash(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [chat("é 漢", "a")])
    environment = {**cli_environment(), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        cli_command("data", "inspect", file), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "\\u27e6" in done.stdout


# The account


def test_validate_counts_names_and_writes_every_bad_row(write_experiment, tmp_path):
    file, _ = write_experiment(own_data=True)
    data = tmp_path / "data"
    rows = [json.loads(row) for row in (data / "train.jsonl").read_text().splitlines()]
    report = (data / "report.jsonl").read_text().splitlines()
    rows[3]["images"] = ["images/no-1.png"]
    rows[4]["images"] = ["images/no-2.png"]
    rows[5]["messages"][0]["content"][1]["text"] = "<end_of_utterance>"
    rows[7] = rows[6]
    write_rows(data / "train.jsonl", [*rows, json.loads(report[0])])
    (data / "report.jsonl").write_text("\n".join([*report, report[1]]) + "\n")
    image = data / "images" / "train-8.png"
    image.write_bytes(image.read_bytes()[:300])
    output = tmp_path / "bad.jsonl"
    text = run("validate", file, "--output", output, status=1).stdout
    assert "seen 48 = good 43 + bad 5 (10.4 %)" in text
    assert re.search(r"2 +image not found: images/no-1.png +train.jsonl:4 *\n", text)
    assert re.search(r"1 +cannot decode the PNG image: truncated +train.jsonl:9 *\n", text)
    assert re.search(r"1 +the user's text contains the control token .* +train.jsonl:6 *\n", text)
    assert re.search(r"1 +exact duplicate of report.jsonl:2 +report.jsonl:9 *\n", text)
    assert "exact duplicates: 2" in text and "train.jsonl:8 repeats train.jsonl:7" in text
    assert "groups in two splits: 1 in train/report" in text
    bad = [json.loads(entry) for entry in output.read_text().splitlines()]
    assert [row["origin"] for row in bad] == [
        *(f"train.jsonl:{number}" for number in (4, 5, 6, 9)),
        "report.jsonl:9",
    ]
    assert bad[0]["split"] == "train" and "images/no-1.png" in bad[0]["reason"]
    text = run("validate", file, "--no-tokens", "--max-bad-fraction", 1).stdout
    assert "bad 4" in text and "control token" not in text


def test_over_long_samples_are_counted_or_bad_as_the_experiment_says(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "a" * 40)])
    text = run("validate", file, "data.max_length=20").stdout
    assert "1 of the good ones are longer than data.max_length=20" in text
    text = run("validate", file, "data.max_length=20", "data.over_long=error", status=1).stdout
    assert "more than data.max_length=20" in text


def test_what_the_processor_cannot_take_is_a_bad_row(tmp_path, model_of):
    picture(0, 900, 2).save(tmp_path / "thin.png")
    row = {"image": "thin.png", "text": "a"}
    file = write_rows(tmp_path / "a.jsonl", [row])
    text = run("validate", file, "--model", model_of("qwen2_5_vl"), status=1).stdout
    assert "the processor refuses it: absolute aspect ratio" in text


def test_stats_are_those_of_the_encoder(tmp_path, encoder_of):
    data = tmp_path / "data"
    write_data(data, num_train=20, num_other=1)
    encoder = encoder_of("demo")
    rows = [json.loads(row) for row in (data / "train.jsonl").read_text().splitlines()]
    rows += [chat("text only", "yes")]
    write_rows(data / "train.jsonl", rows)
    lengths, labelled = [], []
    for row in rows:
        images = [picture(0, 48, 48)] * len(row.get("images", []))
        encoded = encoder.training(row["messages"], images)
        lengths.append(len(encoded.input_ids))
        labelled.append(encoded.num_labelled)
    output = run("stats", data / "train.jsonl").stdout
    cells = {line[:17].strip(): line[17:].split() for line in output.splitlines()}
    expected = spread(np.array(lengths))
    assert float(cells["tokens"][0]) == expected.minimum == min(lengths)
    assert float(cells["tokens"][5]) == max(lengths)
    assert float(cells["labelled tokens"][5]) == max(labelled)
    assert cells["image width"][0] == "48" and cells["megapixels"][0] == "0.0023"
    assert "0 in 1 samples, 1 in 20 samples" in output and "PNG 20" in output
    assert re.search(r"text only +1 \(4.76 %\)", output)
    assert f"{sum(lengths):,}\n" in output
    assert "8 % in random" not in output and "padding" in output


@pytest.mark.parametrize(
    ("values", "open_end"),
    [([5], False), ([0, 1], False), (range(1000), False), ([*[10] * 500, 40_000], True)],
)
def test_a_histogram_loses_nothing(values, open_end):
    values = np.array(list(values))
    made = histogram(values)
    assert sum(made.counts) == len(values) and len(made.edges) == len(made.counts) + 1
    assert len(made.counts) <= 17 and made.open_end is open_end
    for low, high, count in zip(made.edges[:-2], made.edges[1:], made.counts, strict=False):
        assert count == ((values >= low) & (values < high)).sum()
    drawing = page.drawing(made, 30)
    assert len(drawing["bars"]) == len(made.counts)


def test_bars_and_padding():
    assert bars([0, 1, 1000], 4) == ["", "▏", "████"]
    assert padding_waste(np.array([3] * 16), 8) == 0
    assert padding_waste(np.array([1] * 7), 8) is None
    assert padding_waste(np.array([1] * 7 + [9]), 8) == pytest.approx(1 - 16 / 72)


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    write_data(tmp_path / "data", num_train=1, num_other=1)
    html = tmp_path / "x.html"
    run("inspect", tmp_path / "data" / "train.jsonl", "--html", html)
    assert html.read_text().rstrip().endswith("</html>")
    assert not list(tmp_path.glob(".*"))
