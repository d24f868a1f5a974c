"""The data path on real Ray: starved of CPUs, refused, and with samples without images."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import ray
from made import run_cli

from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import DataError
from raytune_vlm.prepare.feed import CachedFeed, Collation
from raytune_vlm.prepare.plan import Plan, PlanSpec
from raytune_vlm.prepare.stream import Decoding, DecodingFeed, StreamSource, streamed_blocks
from raytune_vlm.records import SweepFolder, read_json, read_json_lines

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_a_stream_flows_while_every_cpu_is_held_and_its_errors_are_ours(tiny_base, tiny_split):
    @ray.remote(num_cpus=2)
    class Hog:
        def ready(self):
            return True

    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    spec, collation = PlanSpec(batch_size=8, seed=1), Collation("idefics3", 0, 3)
    plan = Plan(split.lengths, split.sources, spec, data_digest="d")
    index = split._store / "index.arrow"
    maker = PixelMaker(base.processor.image_processor, base.family, "pil", ImageLimits())
    source = StreamSource(str(split._store), str(index), spec, "d", collation)

    def begin(source):
        return DecodingFeed(
            streamed_blocks(source, split, 12),
            Decoding(collation, maker),
            plan,
            split.lengths,
            num_threads=2,
            stall_timeout_s=30,
        )

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        hog = Hog.remote()
        assert ray.get(hog.ready.remote()) and ray.available_resources().get("CPU", 0) == 0
        stream, cached = begin(source), CachedFeed(split, plan, collation)
        for step in (0, 1, 2, 7, 8, 11):
            for ours, theirs in zip(stream.step(step), cached.step(step), strict=True):
                assert ours.rows == theirs.rows and ours.arrays.keys() == theirs.arrays.keys()
                assert all(np.array_equal(ours.arrays[n], theirs.arrays[n]) for n in ours.arrays)
        stream.close()
        stream = begin(replace(source, index_file=f"{index}.old"))
        with pytest.raises(DataError, match=r"index\.arrow\.old is gone: run") as raised:
            stream.step(0)
        assert type(raised.value) is DataError
        stream.close()
    finally:
        ray.shutdown()


def test_what_preparation_refuses_is_one_line_and_status_2(write_experiment):
    file, folder = write_experiment("refused")
    done = run_cli("prepare", file, "data.max_length=10", "data.over_long=error", check=False)
    assert done.returncode == 2 and not folder.exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "tokens, more than data.max_length=10" in lines[0]
    assert "Traceback" not in done.stderr


def test_text_only_samples_train_beside_images_on_two_workers(write_experiment, tmp_path):
    file, folder = write_experiment(
        own_data=True,
        train={"max_steps": 5, "warmup_steps": 1, "batch_size": 2, "num_workers": 2},
        lora={"rank": 4, "scope": "text+vision"},
    )
    _take_images_from_every_other_row(tmp_path / "data" / "train.jsonl")
    run_cli("train", file, "train.log_every=1")
    trial = SweepFolder(folder).trial("t0000")
    losses = [row["loss"] for row in read_json_lines(trial.metrics_file)]
    assert len(losses) == 5 and all(0 < loss < 10 for loss in losses)
    assert trial.record().audit["gradients"]["passed"]
    plan = read_json(SweepFolder(folder).plan_file)
    assert (plan["num_samples"], plan["batch_size"]) == (30, 2)
    states = [read_json(file) for file in trial.checkpoints.glob("*/state.json")]
    assert {state["plan_digest"] for state in states} == {plan["digest"]}


def _take_images_from_every_other_row(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows[::2]):
        row["images"] = []
        row["messages"][0]["content"] = [{"type": "text", "text": f"say {number}"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
