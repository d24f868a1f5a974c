"""The decoding feed without Ray: what it says when nothing comes, its errors, its threads."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import InfrastructureError
from raytune_vlm.images import ImageError
from raytune_vlm.prepare.feed import CachedFeed, Collation
from raytune_vlm.prepare.plan import Plan, PlanSpec
from raytune_vlm.prepare.stream import Decoding, DecodingFeed, StreamSource, stored_blocks

COLLATION = Collation("idefics3", 0, 3)


class Maker(PixelMaker):
    """The model's own, until it is to wait or to fail."""

    hold: threading.Event | None = None
    error: Exception | None = None

    def decode(self, images):
        if self.hold is not None:
            self.hold.wait()
        if self.error is not None:
            raise self.error
        return super().decode(images)


@pytest.fixture
def stream(tiny_base, tiny_split):
    """Begins feeds over the 40 prepared samples and closes them."""
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    plan = Plan(split.lengths, split.sources, PlanSpec(batch_size=8, seed=1), data_digest="d")
    opened = []

    def begin(blocks=None, stall_timeout_s=30.0):
        blocks = blocks or stored_blocks(split, plan, COLLATION, 40)
        maker = Maker(base.processor.image_processor, base.family, "pil", ImageLimits())
        opened.append(
            DecodingFeed(
                blocks,
                Decoding(COLLATION, maker),
                plan,
                split.lengths,
                num_threads=2,
                stall_timeout_s=stall_timeout_s,
            )
        )
        return opened[-1], maker

    begin.cached = CachedFeed(split, plan, COLLATION)
    yield begin
    for feed in opened:
        feed.close()


def threads():
    """The feed's threads that run."""
    names = ("stream", "decode")
    return [entry for entry in threading.enumerate() if entry.name.startswith(names)]


def assert_ended(found):
    for entry in found:
        entry.join(30)
    assert not any(entry.is_alive() for entry in found)


def test_what_is_decoded_ahead_is_what_the_store_gives(stream):
    feed, _ = stream()
    for step in (0, 1, 5):
        for ours, theirs in zip(feed.step(step), stream.cached.step(step), strict=True):
            assert ours.rows == theirs.rows and ours.arrays.keys() == theirs.arrays.keys()
            assert all(np.array_equal(ours.arrays[n], theirs.arrays[n]) for n in ours.arrays)


def test_blocks_that_never_come_are_the_infrastructure_s_fault(stream):
    released = threading.Event()

    def blocks(first):
        released.wait()
        yield from ()

    feed, _ = stream(blocks, stall_timeout_s=0.02)
    try:
        with pytest.raises(InfrastructureError, match=r"no batch for 0\.1 s; "):
            feed.step(0)
    finally:
        released.set()


def test_a_decoder_that_hangs_is_too_and_does_not_keep_the_feed_from_closing(stream):
    feed, maker = stream(stall_timeout_s=0.02)
    maker.hold = threading.Event()
    try:
        with pytest.raises(InfrastructureError, match=r"no batch for 0\.1 s; "):
            feed.step(0)
        hanging = threads()
        feed.close()
    finally:
        maker.hold.set()
    assert_ended(hanging)


@pytest.mark.parametrize("error", [ImageError("cannot decode"), TimeoutError("a disk's own")])
def test_an_error_of_a_decoding_thread_comes_out_as_it_is(stream, error):
    feed, maker = stream()
    maker.error = error
    with pytest.raises(type(error), match=str(error)):
        feed.step(0)


def test_an_error_of_the_blocks_comes_out_as_it_is(stream):
    def blocks(first):
        raise OSError("the store is gone")
        yield

    feed, _ = stream(blocks)
    with pytest.raises(OSError, match="the store is gone"):
        feed.step(0)


def test_blocks_that_end_too_early_are_told(stream):
    feed, _ = stream(lambda first: iter(()))
    with pytest.raises(InfrastructureError, match="the stream has ended before the plan"):
        feed.step(0)


def test_close_ends_the_threads_though_nobody_takes_what_they_made(stream):
    feed, _ = stream()
    for step in (0, 3):  # after a close it begins anew
        feed.step(step)
        running = threads()
        assert {entry.name.split("_")[0] for entry in running} == {"stream", "decode"}
        feed.close()
        assert_ended(running)


def test_a_task_reads_the_same_where_batches_of_text_get_a_blank_image(tiny_base, tiny_split):
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    blank = Encoder(base.processor, base.family, base.image_backend).blank()
    store, spec = split._store, PlanSpec(batch_size=8, seed=1)
    tables = [
        StreamSource(str(store), str(store / "index.arrow"), spec, "d", collation).read([0, 1])
        for collation in (COLLATION, replace(COLLATION, blank=blank))
    ]
    assert len(tables[0]) == 16 and tables[0].equals(tables[1])
