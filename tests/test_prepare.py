"""The prepared store: split by group, quarantine, counting, nothing done twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made import experiment, picture, write_data

from raytune_vlm.config.data import SplitConfig
from raytune_vlm.errors import DataError
from raytune_vlm.prepare.prepare import list_shards, prepare
from raytune_vlm.prepare.shard import ShardPreparer, split_of


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
        made = [job for job in jobs if not (store / job.key).exists()]
        preparer = ShardPreparer(config, store.resolve())
        for job in made:
            preparer(job)
        return prepare(config, jobs, lambda done, total: None), len(made)

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
    assert data.split("report").thumbnail(0)[:2] == b"\xff\xd8" and select.thumbnail(0) is None


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


def test_groups_that_stand_in_two_splits_are_counted(project):
    first = json.loads((project.folder / "train.jsonl").read_text().splitlines()[0])
    rewrite(project.folder / "report.jsonl", lambda rows: rows.append(first))
    data, _ = project.run(project())
    assert data.manifest.overlap == {"train/report": 1}


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
