"""The plan: every sample once an epoch, exact mixtures, packs; independent of the workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_vlm.errors import DataError
from raytune_vlm.prepare.feed import Collation
from raytune_vlm.prepare.packing import best_fit_decreasing
from raytune_vlm.prepare.plan import Plan, PlanSpec, exact_quotas, micro_batches


def plan_of(num_samples=10, lengths=None, sources=None, **spec):
    lengths = np.full(num_samples, 5) if lengths is None else np.asarray(lengths)
    sources = np.zeros(len(lengths), dtype=int) if sources is None else np.asarray(sources)
    settings_ = {"batch_size": 4, "seed": 3, **spec}
    return Plan(lengths, sources, PlanSpec(**settings_), data_digest="d")


def drawn(plan, steps):
    return [int(row) for step in range(steps) for row in plan.rows(step)]


def test_every_sample_once_an_epoch_and_nothing_dropped():
    rows = drawn(plan_of(), 5)
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


@pytest.mark.parametrize("spec", [{}, {"group_by_length": True}, {"pack_length": 20}])
def test_a_step_is_the_same_wherever_one_begins(spec):
    lengths = np.random.default_rng(0).integers(1, 20, 57)
    whole = plan_of(lengths=lengths, **spec)
    steps = [[unit.tolist() for unit in whole.step(number)] for number in range(40)]
    late = plan_of(lengths=lengths, **spec)
    assert [unit.tolist() for unit in late.step(33)] == steps[33]
    assert [unit.tolist() for unit in late.step(2)] == steps[2]
    assert late.digest == whole.digest


def test_the_digest_knows_samples_seed_and_settings():
    first = plan_of()
    others = [
        plan_of(seed=4),
        plan_of(batch_size=5),
        plan_of(group_by_length=True),
        plan_of(lengths=[5] * 9 + [6]),
        plan_of(sources=[0] * 9 + [1]),
    ]
    assert len({plan.digest for plan in [first, *others]}) == 6


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=90),
    capacity=st.integers(30, 100),
    window=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_and_never_overfills(lengths, capacity, window):
    items = np.array(lengths)
    bins = best_fit_decreasing(items, capacity, window)
    assert sorted(set(bins.tolist())) == list(range(bins.max() + 1))
    assert np.bincount(bins, weights=items).max() <= capacity
    for start in range(0, len(items), window):
        inside = set(bins[start : start + window].tolist())
        assert inside.isdisjoint(bins[start + window :].tolist())
        assert _by_hand(items[start : start + window], capacity) == _content(
            items[start : start + window], bins[start : start + window]
        )


def _by_hand(items, capacity):
    """Best-fit decreasing as a textbook writes it: the fills of the bins."""
    bins: list[list[int]] = []
    for item in sorted(items.tolist(), reverse=True):
        fitting = [entry for entry in bins if sum(entry) + item <= capacity]
        if fitting:
            max(fitting, key=sum).append(item)
        else:
            bins.append([item])
    return sorted(sum(entry) for entry in bins)


def _content(items, bins):
    return sorted(int(items[bins == number].sum()) for number in np.unique(bins))


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"1\.\.8, got 3\.\.9"):
        best_fit_decreasing(np.array([3, 9]), 8)


def test_packs_hold_every_sample_once_an_epoch_and_waste_little():
    lengths = np.clip(np.random.default_rng(1).lognormal(6.5, 0.5, 5000), 50, 4000).astype(int)
    plan = plan_of(lengths=lengths, pack_length=4096)
    epoch = plan.epoch(0)
    assert sorted(epoch.rows.tolist()) == list(range(5000))
    assert plan.efficiency() >= 0.97
    fills = np.add.reduceat(lengths[epoch.rows], epoch.starts[:-1])
    assert fills.max() <= 4096
    # Not in the order of their fill: the first half is as full as the second.
    half = len(fills) // 2
    assert fills[:half].mean() == pytest.approx(fills[half:].mean(), rel=0.01)


def test_mixtures_meet_their_quotas_exactly_and_everywhere():
    sources = np.repeat([0, 1, 2], [100, 400, 500])
    plan = plan_of(lengths=np.full(1000, 5), sources=sources, weights=(2.0, 1.0, 1.0))
    for epoch in range(3):
        rows = plan.epoch(epoch).rows
        assert np.bincount(sources[rows]).tolist() == [500, 250, 250]
        shares = np.cumsum(np.eye(3)[sources[rows]], axis=0)
        quota = np.arange(1, 1001)[:, None] * np.array([0.5, 0.25, 0.25])
        assert np.abs(shares - quota).max() < 2
    counts = Counter(np.concatenate([plan.epoch(number).rows for number in range(4)]).tolist())
    small = [counts[row] for row in range(100)]
    assert set(small) == {20}  # 4 x 500 draws of 100 samples
    large = [counts[row] for row in range(500, 1000)]
    assert set(large) == {2}


def test_quotas_sum_up_and_what_rounding_takes_it_gives_back():
    assert exact_quotas((1.0, 1.0, 1.0), 10, 3) == [[4, 3, 3], [3, 4, 3], [3, 3, 4]]
    assert exact_quotas((0.5, 0.0, 0.25), 8, 1) == [[5, 0, 3]]
    rare = np.array(exact_quotas((0.999, 0.001), 400, 40))
    assert rare.sum(axis=1).tolist() == [400] * 40 and rare.min() >= 0
    assert rare[:, 1].sum() == 16


def test_a_weight_without_samples_is_an_error():
    with pytest.raises(DataError, match=r"data\.sources\[1\] has a weight but no training samples"):
        plan_of(weights=(1.0, 1.0))


def test_length_groups_pad_less_and_keep_every_sample():
    lengths = np.random.default_rng(2).integers(1, 500, 1003)
    padding = {}
    for grouped in (False, True):
        plan = plan_of(lengths=lengths, group_by_length=grouped)
        steps = [lengths[plan.rows(number)] for number in range(250)]
        padding[grouped] = 1 - sum(s.sum() for s in steps) / sum(s.max() * len(s) for s in steps)
        assert sorted(drawn(plan, 251)[:1003]) == list(range(1003))
    assert padding[True] < 0.15 * padding[False]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world_size=st.integers(1, 5),
    max_units=st.integers(1, 9),
    max_tokens=st.none() | st.integers(50, 200),
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_hold_every_unit_within_their_limits(
    lengths, world_size, max_units, max_tokens
):
    units = [np.array([row]) for row in range(len(lengths))]
    batches = micro_batches(
        units,
        np.array(lengths),
        world_size=world_size,
        max_units=max_units,
        max_tokens=max_tokens,
    )
    assert sorted(place for batch in batches for place in batch) == list(range(len(units)))
    assert all(len(batch) <= max_units for batch in batches)
    assert len(batches) >= min(world_size, len(units))
    if max_tokens is not None:
        padded = [len(batch) * max(lengths[place] for place in batch) for batch in batches]
        assert max(padded) <= max_tokens


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_step_without_loss_or_copy_and_keep_in_step(world_size):
    lengths = np.random.default_rng(3).integers(1, 60, 31)
    plan = plan_of(lengths=lengths, batch_size=8)
    for number in range(9):
        ranks = [
            Collation("idefics3", 0, 3, 90, rank, world_size).parts(plan, lengths, number)
            for rank in range(world_size)
        ]
        assert len({len(parts) for parts in ranks}) == 1
        seen = [row for parts in ranks for part in parts if part.counts for row in part.rows]
        assert sorted(seen) == sorted(plan.rows(number).tolist())


def test_no_two_uses_of_a_sample_have_the_same_draw():
    plan = plan_of(3, batch_size=5)
    parts = [Collation("idefics3", 0, 5).parts(plan, np.full(3, 5), step)[0] for step in (0, 1)]
    draws = [draw for part in parts for draw in part.draws]
    assert sorted(draws) == list(range(10))
