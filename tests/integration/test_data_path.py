"""The stream of data on real Ray that has no CPU left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import ray

from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import DataError
from raytune_vlm.prepare.feed import CachedFeed, Collation
from raytune_vlm.prepare.plan import Plan, PlanSpec
from raytune_vlm.prepare.stream import Decoding, DecodingFeed, StreamSource, streamed_blocks

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
