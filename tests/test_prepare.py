"""The prepared store: split by group, quarantine, counting, nothing done twice."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pyarrow as pa
import pytest
from made import experiment, picture, write_data

from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import SplitConfig
from raytune_vlm.errors import DataError
from raytune_vlm.prepare.prepare import list_shards, prepare
from raytune_vlm.prepare.shard import PixelStep, Preparer, TokenStep, split_of
from raytune_vlm.prepare.store import (
    BATCH_BYTES,
    BATCH_ROWS,
    PreparedSplit,
    RowWriter,
    encoded_to_row,
)
from raytune_vlm.sources.containers import json_lines


@pytest.fixture
def project(tmp_path, tiny_model):
    """An experiment over fresh data, and a function that prepares it in this process."""
    write_data(tmp_path / "data", num_train=12, num_other=5)

    def make(**data):
        sources = [
            {"type": "messages", "path": f"{split}.jsonl", "split": split}
            for split in ("train", "select", "report")
        ]
        return experiment(
            tiny_model("idefics3"),
            storage_path=str(tmp_path / "runs"),
            data={"root": str(tmp_path / "data"), "sources": sources, **data},
        )

    def run(config):
        store = tmp_path / "runs" / "prepared"
        jobs = list_shards(config)
        store.mkdir(parents=True, exist_ok=True)
        made = [job for job in jobs if not (store / job.key).exists()]
        preparer = Preparer(config, store.resolve())
        for step in (TokenStep(preparer), PixelStep(preparer)):
            for job in jobs:
                step(job)
        return prepare(config, jobs, lambda step, done, total: None), len(made)

    make.run, make.folder = run, tmp_path / "data"
    return make


def rewrite(file, change):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_samples_come_back_as_they_were_encoded(project):
    data, _ = project.run(project())
    train, select = data.split("train"), data.split("select")
    assert (len(train), len(select), len(data.split("report"))) == (12, 5, 5)
    sample = train.encoded(3)
    assert sample.tensors["pixel_values"].dtype == np.uint8
    assert sample.num_labelled == train.num_labelled[3] == len("egg") + 1
    assert len(sample.input_ids) == train.lengths[3]
    prompt = select.encoded(0)
    assert prompt.spans == []
    assert (select.text(0, "prompt"), select.text(0, "reference")) == ("read", "tea")
    file = project.folder / "images" / "report-2.png"
    assert data.split("report").images(2) == [file.read_bytes()]


def test_rows_are_found_whatever_record_batches_they_came_into(tmp_path):
    sizes = [0] * (BATCH_ROWS + 5) + [BATCH_BYTES // 2 + 1] * 3 + [7] * 4
    file = tmp_path / "shard" / "train.arrow"
    file.parent.mkdir()
    with RowWriter(file) as writer:
        for number, size in enumerate(sizes):
            encoded = Encoded(np.array([number], dtype=np.int32), [(0, 1)], {})
            names = dict.fromkeys(("sample_id", "group_id", "prompt", "reference"), str(number))
            writer.add({**names, **encoded_to_row(encoded), "images": [b"i" * size]})
    batches = pa.ipc.open_file(str(file))
    counts = [batches.get_batch(n).num_rows for n in range(batches.num_record_batches)]
    assert counts == [BATCH_ROWS, 7, 5]
    columns = {"split": "train", "shard": "shard", "source": 0, "sample_id": "", "group_id": ""}
    columns |= dict.fromkeys(("length", "num_labelled", "num_images", "num_bytes"), 1)
    split = PreparedSplit(
        tmp_path, pa.Table.from_pylist([{**columns, "row": row} for row in range(len(sizes))])
    )
    for row in (0, BATCH_ROWS - 1, BATCH_ROWS, len(sizes) - 5, len(sizes) - 4, len(sizes) - 1):
        assert split.text(row, "prompt") == str(row)
        assert [len(image) for image in split.images(row)] == [sizes[row]]


def test_nothing_is_made_twice_and_one_changed_shard_is_made_alone(project):
    first, made = project.run(project())
    assert made == 3
    again, made = project.run(project())
    assert made == 0 and again.manifest.digest == first.manifest.digest
    rewrite(project.folder / "select.jsonl", lambda rows: rows.pop())
    changed, made = project.run(project())
    assert made == 1 and changed.manifest.digest != first.manifest.digest
    assert changed.manifest.splits["select"].num_used == 4
    _, made = project.run(project(max_length=500))
    assert made == 3


def test_what_a_killed_preparation_left_is_removed_after_a_day(project):
    project.run(project())
    store = project.folder.parent / "runs" / "prepared"
    key = "0123456789abcdef"
    left = [f".{key}.01234567", f".{key}.pixels.89abcdef"]
    young = [f".{key}.aaaaaaaa", f".{key}.bbbbbbbb"]
    others = ["0123456789abcdee", f".{key}", f".{key}.0123456", f".{key}.tokens.01234567", ".x"]
    for name in (*left, *young, *others):
        (store / name).mkdir()
        (store / name / "train.arrow").write_bytes(b"half a row")
    file = store / f".{key}.fedcba98"
    file.touch()
    for path in [*store.iterdir(), *store.glob("*/train.arrow"), *store.glob(".*/train.arrow")]:
        os.utime(path, times=(time.time() - 90_000,) * 2)
    os.utime(store / young[0])
    os.utime(store / young[1] / "train.arrow")  # somebody writes in an old folder
    there = {path.name for path in store.iterdir()}
    _, made = project.run(project())
    assert made == 0
    assert {path.name for path in store.iterdir()} == there - set(left)


def test_an_image_replaced_under_its_old_name_changes_the_data(project):
    first, _ = project.run(project())
    picture(77, width=48, height=48).save(project.folder / "images" / "select-1.png")
    changed, made = project.run(project())
    assert made == 1 and changed.manifest.digest != first.manifest.digest
    assert changed.split("select").images(1) != first.split("select").images(1)
    again, made = project.run(project())
    assert made == 0 and again.manifest.digest == changed.manifest.digest


def test_appending_to_a_file_leaves_what_was_there_alone(project, monkeypatch):
    monkeypatch.setattr(json_lines, "ROWS_PER_SHARD", 4)
    _, made = project.run(project())
    rewrite(project.folder / "train.jsonl", lambda rows: rows.extend(rows[:2]))
    data, again = project.run(project())
    assert made > 3 and again == 1
    assert data.manifest.splits["train"].num_used == 14


def test_pixels_are_stored_where_they_fit_and_decoded_where_they_do_not(project):
    stored, _ = project.run(project())
    assert stored.manifest.tier == "pixels"
    assert "within" in stored.manifest.tier_reason
    base = project.folder.parent / "elsewhere"
    config = project(disk_budget_gb=1e-6).model_copy(update={"storage_path": str(base)})
    store = base / "prepared"
    store.mkdir(parents=True)
    preparer = Preparer(config, store.resolve())
    jobs = list_shards(config)
    for job in jobs:
        TokenStep(preparer)(job)
    lean = prepare(config, jobs, lambda step, done, total: None)
    assert lean.manifest.tier == "encoded"
    assert "more than data.disk_budget_gb=1e-06" in lean.manifest.tier_reason
    assert lean.manifest.digest == stored.manifest.digest and not list(store.glob("*.pixels"))
    with pytest.raises(DataError, match="pixels of train are not stored"):
        lean.split("train").encoded(0)
    maker = PixelMaker(
        preparer.processor.image_processor, preparer.family, "pil", config.data.image_limits
    )
    for row in range(12):
        ours = lean.split("train", maker.decode).encoded(row).tensors
        theirs = stored.split("train").encoded(row).tensors
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    strict = config.data.model_copy(update={"tier": "pixels"})
    with pytest.raises(DataError, match=r"tier=pixels needs .*tier=encoded"):
        prepare(config.model_copy(update={"data": strict}), jobs, lambda *_: None)


def test_truncation_cuts_text_and_never_images(project):
    def lengthen(rows):
        rows[3]["messages"][1]["content"][0]["text"] = "long " * 60
        late = {"type": "text", "text": "so " * 60}
        rows[4]["messages"][0]["content"].insert(0, late)

    rewrite(project.folder / "train.jsonl", lengthen)
    data, _ = project.run(project(max_length=100, over_long="truncate"))
    train = data.manifest.splits["train"]
    assert (train.num_used, train.num_truncated, train.num_dropped_over_long) == (11, 1, 1)
    split = data.split("train")
    cut, whole = split.encoded(3), split.encoded(0)
    assert len(cut.input_ids) == 100 and cut.spans[0][1] == 100
    assert cut.tensors["pixel_values"].shape == whole.tensors["pixel_values"].shape


def test_copies_in_training_are_removed_on_request(project):
    rewrite(project.folder / "train.jsonl", lambda rows: rows.extend(rows[2:5]))
    data, _ = project.run(project())
    assert data.manifest.splits["train"].num_used == 15
    single, made = project.run(project(deduplicate=True))
    train = single.manifest.splits["train"]
    assert (made, train.num_seen, train.num_used, train.num_duplicates) == (0, 15, 12, 3)
    assert single.manifest.digest != data.manifest.digest


def test_seen_equals_used_plus_quarantined_plus_dropped(project):
    def harm(rows):
        rows[1]["messages"][1]["content"][0]["text"] = ""
        rows[2]["images"] = ["images/nowhere.png"]
        rows[3]["messages"][1]["content"][0]["text"] = "long " * 60
        rows[4]["messages"][0]["content"][1]["text"] = "read <image> now<end_of_utterance>"

    rewrite(project.folder / "train.jsonl", harm)
    data, _ = project.run(project(max_bad_fraction=0.5, max_length=200))
    train = data.manifest.splits["train"]
    assert (train.num_seen, train.num_used) == (12, 8)
    assert (train.num_quarantined, train.num_dropped_over_long) == (3, 1)
    assert [entry.origin for entry in data.quarantine] == [
        "train.jsonl:2",
        "train.jsonl:3",
        "train.jsonl:5",
    ]
    assert "control token '<end_of_utterance>'" in data.quarantine[2].reason
    with pytest.raises(DataError, match=r"3 of 22 samples cannot be used.*train\.jsonl:2: "):
        project.run(project(max_bad_fraction=0.05, max_length=200))
    with pytest.raises(DataError, match=r"train\.jsonl:4: \d+ tokens, more than data\.max_length"):
        project.run(project(max_bad_fraction=0.5, max_length=200, over_long="error"))


def test_reasons_that_differ_by_a_file_name_are_one_reason(project):
    def harm(rows):
        rows.extend(dict(row) for row in rows[:6] * 4)
        for number, row in enumerate(rows[:30]):
            row["images"] = [f"images/no-{number}.png"]
        rows[30]["messages"] = []

    rewrite(project.folder / "train.jsonl", harm)
    with pytest.raises(DataError) as raised:
        project.run(project())
    assert raised.value.message.startswith("31 of 46 samples cannot be used")
    listed = raised.value.message.partition(" allows: ")[2].split("; train.jsonl:")
    assert len(listed) == 2 and "images/no-0.png" in listed[0]
    assert listed[0].startswith("train.jsonl:1: ") and listed[0].endswith(" (and 29 more)")
    assert listed[1].startswith("31: ") and "more)" not in listed[1]
    data, _ = project.run(project(max_bad_fraction=0.9))
    assert sorted(data.manifest.quarantine_reasons.values()) == [1, 30]


def test_a_truncated_image_costs_its_own_row_only(project):
    image = project.folder / "images" / "train-5.png"
    image.write_bytes(image.read_bytes()[:200])
    data, _ = project.run(project(max_bad_fraction=0.1))
    assert data.manifest.splits["train"].num_used == 11
    assert "truncated" in data.quarantine[0].reason
    assert data.quarantine[0].origin == "train.jsonl:6"


def test_a_sample_that_stands_twice_counts_once_in_a_score(project):
    rewrite(project.folder / "report.jsonl", lambda rows: rows.append(rows[0]))
    data, _ = project.run(project(max_bad_fraction=0.1))
    assert data.manifest.splits["report"].num_used == 5
    assert data.quarantine[0].reason == "exact duplicate of report.jsonl:1"


def test_groups_and_images_that_stand_in_two_splits_are_counted(project):
    first = json.loads((project.folder / "train.jsonl").read_text().splitlines()[0])
    rewrite(project.folder / "report.jsonl", lambda rows: rows.append(first))
    second = json.loads((project.folder / "train.jsonl").read_text().splitlines()[1])
    second["group_id"] = "another name for the same picture"
    second["messages"][1]["content"][0]["text"] = "another answer"
    rewrite(project.folder / "select.jsonl", lambda rows: rows.append(second))
    data, _ = project.run(project())
    assert data.manifest.overlap == {"train/report": 1, "train/select": 1}


def test_auto_split_never_divides_a_group(project):
    def group(rows):
        for number, row in enumerate(rows):
            row["group_id"] = f"document-{number // 2}"

    picture(99).save(project.folder / "images" / "x.png")
    rewrite(project.folder / "train.jsonl", group)
    source = {"type": "messages", "path": "train.jsonl"}
    data, _ = project.run(project(sources=[source], split={"select": 0.2, "report": 0.2}))
    groups = [set(data.split(name).group_ids) for name in ("train", "select", "report")]
    assert sum(len(found) for found in groups) == 6
    assert set.union(*groups) == {f"document-{number}" for number in range(6)}


def test_the_split_of_a_group_follows_the_shares_and_the_seed():
    config = SplitConfig(select=0.2, report=0.1)
    splits = [split_of(f"g{number}", config, seed=1) for number in range(5000)]
    shares = {name: splits.count(name) / 5000 for name in ("train", "select", "report")}
    assert shares == pytest.approx({"train": 0.7, "select": 0.2, "report": 0.1}, abs=0.02)
    assert splits != [split_of(f"g{number}", config, seed=2) for number in range(5000)]


def test_a_limited_choice_is_always_the_same(project):
    data, _ = project.run(project())
    split = data.split("report")
    chosen = split.fixed_choice(3)
    assert len(chosen) == 3 and chosen == sorted(chosen) == data.split("report").fixed_choice(3)
    assert set(split.fixed_choice(2)) < set(chosen) and split.fixed_choice(99) == list(range(5))
