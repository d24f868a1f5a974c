"""Features on disk: found again by other processes, to the bit, and by no other model."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import subprocess
import sys
import time

import feature_worker
import pytest
import torch
from made import cli_environment, experiment
from pydantic import ValidationError
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures as Levels,
)

from raytune_vlm.collate import feature_store
from raytune_vlm.collate.batch import collate
from raytune_vlm.collate.feature_store import FeatureStore, file_system_of, open_store
from raytune_vlm.collate.features import Features
from raytune_vlm.collate.tower_digest import tower_digest
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import load_base

MUCH = 1 << 30


def opened(base, root, said=None):
    """Features of an executor that has just come up."""
    said = [] if said is None else said
    features = Features(base, "cpu", MUCH, said.append)
    features.disk = open_store(root, base, "cpu", MUCH, said.append)
    return features


def given(base, split, rows, features):
    """The features that a model would get of some rows."""
    pad = base.processor.tokenizer.pad_token_id
    batch = collate([split.encoded(row) for row in rows], base.family, pad_token_id=pad)
    return features.replace(batch, split, rows)["mm_encoder_outputs"]["image"]


def are_equal(one, other):
    """Whether classes, containers, dtypes and bits are the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one.keys() == other.keys() and all(are_equal(one[name], other[name]) for name in one)


def output(number, size=100):
    """What a tower might make of an image."""
    value = torch.arange(size, dtype=torch.float32) + number
    return BaseModelOutputWithPooling(pooler_output=[value])


def key(number):
    return bytes([number]) * 16


def store(folder, said=None, max_bytes=MUCH):
    """A store that gives back what is there."""
    folder.mkdir(exist_ok=True)
    found = FeatureStore(folder, max_bytes, ([] if said is None else said).append)
    found.put(key(255), output(255))
    return found


def segments(folder):
    return sorted(folder.rglob("[0-9]*.arrow"))


def test_a_later_process_computes_one_image_and_trains_the_same(tiny_model, tiny_split, tmp_path):
    places = {"model": tiny_model("idefics3"), "store": tiny_split("idefics3")._store}
    jobs = {name: str(place) for name, place in {**places, "root": tmp_path / "root"}.items()}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, feature_worker.__file__, str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=cli_environment())
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "found.json").read_text())
    second = feature_worker.train(jobs)
    assert first["computed"] > 10 and first["read"] == 0
    assert second["computed"] == 1 and second["read"] >= first["computed"] - 1
    assert second["losses"] == first["losses"]
    assert second["folder"] == first["folder"]
    assert first["said"] == second["said"] == []


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava", "gemma3", "idefics3"])
def test_features_come_back_as_they_were_computed(model_type, tiny_base, tiny_split, tmp_path):
    base, split = tiny_base(model_type), tiny_split(model_type)
    rows = [row for row in range(40) if split.num_images[row]][:4]
    writer = opened(base, tmp_path)
    expected = given(base, split, rows, writer)
    writer.disk.flush()
    reader = opened(base, tmp_path)
    assert are_equal(given(base, split, rows, reader), expected)
    assert reader.computed == 1 and reader.read >= 2
    if model_type == "qwen3_vl":
        assert expected["deepstack_features"]


def test_every_shape_of_features_comes_back(tmp_path):
    levels = [(torch.rand(3, 2), torch.rand(1, 2)), (torch.rand(3, 2), torch.rand(0, 2))]
    pooled = torch.rand(2, 3, 5).bfloat16()
    kept = {
        key(1): Levels(pooler_output=pooled, deepstack_features=levels),
        key(2): Levels(pooler_output=(torch.rand(7).half(), torch.rand(3))),
        key(3): Levels(pooler_output=[torch.rand(4, 6).t()], deepstack_features=[pooled, pooled]),
    }
    writer = store(tmp_path)
    for name, features in kept.items():
        writer.put(name, features)
    assert all(writer.get(name) is features for name, features in kept.items())
    writer.flush()
    reader = FeatureStore(tmp_path, MUCH, pytest.fail)
    assert reader.get(key(1)) is None, "its class is not known yet"
    reader.put(key(2), kept[key(2)])
    assert all(are_equal(reader.get(name), features) for name, features in kept.items())
    assert reader.get(key(9)) is None


def test_a_store_is_of_one_tower(tiny_base, tiny_model):
    base = tiny_base("idefics3")
    found = tower_digest(base, "cpu")
    assert tower_digest(load_base(ModelConfig(name=str(tiny_model("idefics3")))), "cpu") == found
    named = dict(base.model.named_parameters())
    for name, counts in {
        "model.vision_model.encoder.layers.0.mlp.fc1.weight": True,
        "model.connector.modality_projection.proj.weight": True,
        "model.text_model.layers.0.mlp.up_proj.weight": False,
    }.items():
        flat = named[name].data.view(-1)
        before = flat[-1].clone()
        flat[-1] += 1
        assert (tower_digest(base, "cpu") != found) == counts, name
        flat[-1] = before
    others = [copy.copy(base) for _ in range(2)]
    others[0].image_backend = "torchvision"
    others[1].processor = copy.deepcopy(base.processor)
    others[1].processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    bfloat16 = ModelConfig(name=str(tiny_model("idefics3")), dtype="bfloat16")
    names = {tower_digest(other, "cpu") for other in (base, *others, load_base(bfloat16))}
    assert len(names) == 4
    torch.set_num_threads(2)
    try:
        assert tower_digest(base, "cpu") not in names
    finally:
        torch.set_num_threads(1)
    assert tower_digest(base, "cpu") == found


def test_bfloat16_features_are_answered_as_pixels(tiny_model, tiny_split, tmp_path):
    base = load_base(ModelConfig(name=str(tiny_model("qwen3_vl")), dtype="bfloat16"))
    split = tiny_split("qwen3_vl")
    rows = [row for row in range(40) if split.num_images[row]][:3]
    writer = opened(base, tmp_path)
    expected = given(base, split, rows, writer)
    assert expected["pooler_output"][0].dtype == torch.bfloat16
    writer.disk.flush()
    assert are_equal(given(base, split, rows, opened(base, tmp_path)), expected)


def test_two_that_compute_the_same_image_at_once_do_no_harm(tmp_path):
    one, other = store(tmp_path), store(tmp_path)
    for executor in (one, other):
        executor.put(key(1), output(1))
    one.flush()
    other.flush()
    assert len(segments(tmp_path)) == 2
    for executor in (one, other, store(tmp_path)):
        assert are_equal(executor.get(key(1)), output(1))


def test_an_executor_finds_what_another_writes_and_misses_what_is_deleted(tmp_path):
    one, other = store(tmp_path), store(tmp_path)
    assert other.get(key(1)) is None
    one.put(key(1), output(1))
    one.flush()
    found = other.get(key(1))
    for file in segments(tmp_path):
        file.unlink()
    assert other.get(key(2)) is None
    assert other.get(key(1)) is None
    assert are_equal(found, output(1)), "who has it mapped goes on reading"


@pytest.mark.parametrize("damage", ["short", "empty", "flipped", "junk"])
def test_a_damaged_segment_is_deleted_with_a_word(damage, tmp_path):
    writer = store(tmp_path)
    writer.put(key(1), output(1))
    writer.flush()
    (file,) = segments(tmp_path)
    whole = file.read_bytes()
    place = whole.index(output(1)["pooler_output"][0].numpy().tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    parts = {"short": whole[:-9], "empty": b"", "flipped": flipped, "junk": b"\0" * len(whole)}
    file.unlink()  # the writer has it mapped
    file.write_bytes(parts[damage])
    said = []
    reader = store(tmp_path, said)
    assert reader.get(key(1)) is None
    assert len(said) == 1 and f"{file} is damaged and is deleted" in said[0]
    assert not file.exists()
    reader.put(key(1), output(1))
    reader.flush()
    assert are_equal(store(tmp_path).get(key(1)), output(1))


def test_what_was_never_finished_is_deleted_with_a_word(tiny_base, tmp_path):
    base, said = tiny_base("idefics3"), []
    folder = open_store(tmp_path, base, "cpu", MUCH, said.append).folder
    old, new = (folder / f".{number}-00000000.features.arrow" for number in (1, 2))
    for file in (old, new):
        file.write_bytes(b"torn")
    os.utime(old, (time.time() - 7200,) * 2)
    assert opened(base, tmp_path, said).disk is not None
    assert new.exists() and not old.exists()
    assert len(said) == 1 and str(old) in said[0]


def test_the_longest_unused_make_room_and_those_in_use_stay(tmp_path):
    size, said = 10_000, []
    other = tmp_path / "other-tower" / "1-00000000.features.arrow"
    other.parent.mkdir()
    (tmp_path / "tower").mkdir()
    other.write_bytes(bytes(4 * size))
    foreign = other.with_name("mine.arrow")
    foreign.write_bytes(bytes(10 * size))
    writer = FeatureStore(tmp_path / "tower", 13 * size, said.append)

    def write(number):
        writer.put(key(number), output(number, size))  # 40 kB, a segment by itself
        return len(segments(tmp_path))

    assert [write(1), write(2), write(3)] == [2, 3, 3]
    assert other.exists() and writer.get(key(3)) is None
    assert len(said) == 1 and "no room for more features" in said[0]
    hours_ago = (time.time() - 7200,) * 2
    os.utime(other, hours_ago)
    assert write(3) == 3 and not other.exists() and foreign.exists()
    os.utime(segments(tmp_path)[0], hours_ago)
    write(4)
    reader = FeatureStore(tmp_path / "tower", 13 * size, said.append)
    reader.put(key(4), output(4, size))
    assert [reader.get(key(number)) is not None for number in range(1, 5)] == [0, 1, 1, 1]
    assert len(said) == 1


def test_a_share_of_the_disk_stays_free(tmp_path, monkeypatch):
    said = []
    writer = store(tmp_path / "tower", said)
    monkeypatch.setattr(feature_store, "LEFT_FREE", 1.0)
    writer.flush()
    assert not segments(tmp_path)
    assert len(said) == 1 and "GB of the disk are free" in said[0]


def test_a_full_disk_is_said_once_and_all_goes_on(tmp_path):
    said = []
    writer = store(tmp_path, said)
    writer.put(key(1), output(1))
    writer.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for number in (2, 3):
            writer.put(key(number), output(number, 10_000))
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 1 and "no longer written" in said[0] and "File too large" in said[0]
    assert are_equal(writer.get(key(1)), output(1)) and writer.get(key(2)) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_is_for_reading_only_is_read(tmp_path, monkeypatch):
    writer, said = store(tmp_path), []
    writer.put(key(1), output(1))
    writer.flush()

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(feature_store, "utime", read_only)
    assert are_equal(store(tmp_path, said).get(key(1)), output(1))
    assert not said


def test_a_store_that_has_other_features_of_an_image_is_left(tmp_path):
    writer, said = store(tmp_path), []
    writer.put(key(1), output(1))
    writer.flush()
    other = FeatureStore(tmp_path, MUCH, said.append)
    other.put(key(1), output(2))
    assert other.get(key(255)) is None
    assert len(said) == 1 and "differ from those computed of the same image" in said[0]


def test_a_folder_that_cannot_be_is_said(tiny_base, tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    assert opened(tiny_base("idefics3"), tmp_path / "file", said).disk is None
    assert len(said) == 1 and "not kept on disk" in said[0]


def test_the_file_system_of_a_folder(tmp_path):
    mounts = tmp_path / "mounts"
    place = str(tmp_path / "on a server").replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {place} nfs4 rw 0 0\n")
    assert file_system_of(tmp_path, mounts) == "ext4"
    assert file_system_of(tmp_path / "on a server" / "features", mounts) == "nfs4"
    assert file_system_of(tmp_path, tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"feature_disk_gb": 5, "feature_cache_gb": 0}, "no effect with feature_cache_gb=0"),
        (
            {"feature_disk_gb": 5, "backend": "fsdp2", "num_workers": 2},
            "feature_disk_gb=5 has no effect with backend=fsdp2",
        ),
        ({"feature_disk_folder": "/x"}, "feature_disk_folder=/x has no effect"),
        ({"feature_disk_gb": 5, "feature_disk_folder": "x"}, "must be an absolute path"),
    ],
)
def test_settings_without_effect_are_refused(train, message):
    with pytest.raises(ValidationError, match=message):
        experiment(train=train)
