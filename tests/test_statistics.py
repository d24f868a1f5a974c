"""Intervals, paired tests, and the correction for picking the best of many."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.statistics import (
    corrected_winner,
    detectable_difference,
    estimate,
    holm,
    indistinguishable,
    mcnemar,
    paired_test,
)
from raytune_vlm.evaluate.statistics.intervals import wilson

SETTINGS: dict[str, Any] = {"confidence": 0.95, "num_bootstrap": 500, "seed": 0}
NAMES: dict[str, Any] = {"metric": "m", "first": "a", "second": "b"}


def own_groups(num_samples: int) -> list[str]:
    return [f"g{number}" for number in range(num_samples)]


def trials(num_trials: int, num_samples: int, seed: int) -> NDArray[np.float64]:
    """Equally good trials: right with probability 0.6 on every sample."""
    generator = np.random.default_rng(seed)
    return (generator.random((num_trials, num_samples)) < 0.6).astype(float)


# estimate


def test_value_is_the_ratio() -> None:
    found = estimate([0.5, 1.0, float("nan")], [1, 3, 100], own_groups(3), **SETTINGS)
    assert found.value == pytest.approx(3.5 / 4)
    assert found.lower <= found.value <= found.upper


def test_standard_error_of_a_mean() -> None:
    values = trials(1, 200, seed=1)[0]
    found = estimate(values, np.ones(200), own_groups(200), **SETTINGS)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 200**0.5)
    assert found.upper - found.lower == pytest.approx(2 * 1.96 * found.standard_error, rel=0.15)


def test_repeated_samples_in_a_group_add_no_certainty() -> None:
    values = trials(1, 60, seed=2)[0]
    once = estimate(values, np.ones(60), own_groups(60), **SETTINGS)
    groups = [group for group in own_groups(60) for _ in range(5)]
    five = estimate(values.repeat(5), np.ones(300), groups, **SETTINGS)
    assert five.standard_error == pytest.approx(once.standard_error)
    assert (five.lower, five.upper) == pytest.approx((once.lower, once.upper))


def test_same_seed_same_interval() -> None:
    values = trials(1, 30, seed=3)[0]
    first, second = (estimate(values, np.ones(30), own_groups(30), **SETTINGS) for _ in range(2))
    assert first == second


def test_one_group_knows_nothing() -> None:
    found = estimate([0.2, 0.4], [1, 1], ["g", "g"], **SETTINGS)
    assert (found.lower, found.upper, found.standard_error) == (0, 1, 0.5)
    rate = estimate([3.0], [2], ["g"], **SETTINGS)
    assert (rate.value, rate.lower, rate.upper) == (3, 0, 3)


def test_unanimous_groups_keep_some_doubt() -> None:
    right = estimate(np.ones(20), np.ones(20), own_groups(20), **SETTINGS)
    assert (right.lower, right.upper) == (pytest.approx(0.05 ** (1 / 20)), 1)
    wrong = estimate(np.zeros(20), np.ones(20), own_groups(20), **SETTINGS)
    assert (wrong.lower, wrong.upper) == (0, pytest.approx(1 - 0.05 ** (1 / 20)))


def test_a_share_near_an_end_takes_the_score_interval() -> None:
    """Which rule when: fewer than ten effective successes or failures take Wilson's interval."""
    values = np.array([1.0] * 97 + [0.0] * 3)
    near = estimate(values, np.ones(100), own_groups(100), **SETTINGS)
    assert (near.lower, near.upper) == pytest.approx(wilson(0.97, 100, 0.95), abs=1e-3)
    # Newcombe 1998 (Statistics in Medicine 17, table I) gives these for 15 of 148.
    assert wilson(15 / 148, 148, 0.95) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    middle = np.array([1.0] * 60 + [0.0] * 40)
    found = estimate(middle, np.ones(100), own_groups(100), **SETTINGS)
    assert (found.lower, found.upper) != pytest.approx(wilson(0.6, 100, 0.95), abs=1e-3)
    rate = estimate(values * 5, np.ones(100), own_groups(100), **SETTINGS)
    assert rate.upper > 1  # an error rate above 1 is no share


def test_a_share_near_an_end_pays_for_its_groups() -> None:
    values = np.array([1.0] * 95 + [0.0] * 5)
    alone = estimate(values, np.ones(100), own_groups(100), **SETTINGS)
    together = estimate(
        values, np.ones(100), [f"g{number // 5}" for number in range(100)], **SETTINGS
    )
    assert together.upper - together.lower > 1.5 * (alone.upper - alone.lower)
    uneven = ["big"] * 80 + [f"g{number}" for number in range(20)]
    unanimous = estimate(np.ones(100), np.ones(100), uneven, **SETTINGS)
    assert unanimous.lower < 0.2  # one document is most of it


def test_weights_of_zero_count_equally() -> None:
    assert estimate([1.0, 1.0], [0, 0], own_groups(2), **SETTINGS).value == 1


@pytest.mark.parametrize(
    ("values", "weights", "groups", "message"),
    [
        ([float("nan")], [1], ["g"], "no sample has a score"),
        ([], [], [], "no sample has a score"),
        ([1.0, 2.0], [1], ["g", "h"], "do not fit"),
        ([1.0], [1], ["g", "h"], "do not fit"),
        ([float("inf")], [1], ["g"], "infinite"),
        ([1.0], [-1], ["g"], "negative"),
    ],
)
def test_impossible_input(values: Any, weights: Any, groups: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        estimate(values, weights, groups, **SETTINGS)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 3) | st.just(float("nan")), st.floats(0, 9), st.sampled_from("abcde")
        ),
        min_size=1,
        max_size=12,
    )
)
def test_estimates_are_finite_and_ordered(rows: list[tuple[float, float, str]]) -> None:
    values, weights, groups = zip(*rows, strict=True)
    if np.isnan(values).all():
        return
    found = estimate(values, weights, groups, **{**SETTINGS, "num_bootstrap": 100})
    assert np.isfinite([found.value, found.lower, found.upper, found.standard_error]).all()
    assert found.lower <= found.value <= found.upper


# a metric that is no ratio


def ratio_of_sums(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(totals[..., 0] / totals[..., 1])


def test_sums_that_make_a_ratio_give_what_the_ratio_gives() -> None:
    generator = np.random.default_rng(5)
    weights = generator.integers(1, 9, (3, 60)).astype(float)
    values = generator.random((3, 60)) * [[1.0], [0.9], [0.5]]
    values[:, 7] = float("nan")
    sums = np.stack([values * weights, weights], axis=-1)
    groups = [f"g{number // 2}" for number in range(60)]
    ones = np.ones((3, 60))
    more: Any = {**SETTINGS, "combine": ratio_of_sums}
    one, same = (
        estimate(values[0], weights[0], groups, **SETTINGS),
        estimate(sums[0], ones[0], groups, **more),
    )
    assert (one.value, one.lower, one.upper) == pytest.approx((same.value, same.lower, same.upper))
    assert same.standard_error == pytest.approx(one.standard_error, rel=0.2)
    assert paired_test(values[:2], weights[:2], groups, **NAMES, **SETTINGS) == paired_test(
        sums[:2], ones[:2], groups, **NAMES, **more
    )
    assert corrected_winner(values, weights, groups, mode="max", **SETTINGS) == corrected_winner(
        sums, ones, groups, mode="max", **more
    )
    assert indistinguishable(
        values, weights, groups, winner=0, mode="max", **SETTINGS
    ) == indistinguishable(sums, ones, groups, winner=0, mode="max", **more)


# paired_test


def test_clear_difference_and_its_mirror_image() -> None:
    values = np.stack([np.full(40, 0.9), np.full(40, 0.7)])
    values += np.random.default_rng(0).normal(0, 0.1, values.shape)
    found = paired_test(values, np.ones((2, 40)), own_groups(40), **NAMES, **SETTINGS)
    assert found.difference == pytest.approx(0.2, abs=0.05)
    assert 0 < found.lower < found.difference < found.upper
    assert found.p_value == pytest.approx(1 / 501)
    assert (found.metric, found.first, found.second, found.num_samples) == ("m", "a", "b", 40)
    mirror = paired_test(values[::-1], np.ones((2, 40)), own_groups(40), **NAMES, **SETTINGS)
    assert (mirror.difference, mirror.p_value) == (-found.difference, found.p_value)
    assert (mirror.lower, mirror.upper) == pytest.approx((-found.upper, -found.lower))


def test_few_groups_take_every_exchange() -> None:
    """Five groups that all favour the first: 2 of the 32 exchanges are as extreme."""
    values = np.array([[1.0] * 5, [0.0, 0.1, 0.2, 0.3, 0.4]])
    found = paired_test(values, np.ones((2, 5)), own_groups(5), **NAMES, **SETTINGS)
    assert found.p_value == 2 / 32


def test_identical_systems_and_one_group() -> None:
    values = trials(1, 30, seed=0).repeat(2, axis=0)
    same = paired_test(values, np.ones((2, 30)), own_groups(30), **NAMES, **SETTINGS)
    assert (same.difference, same.lower, same.upper, same.p_value) == (0, 0, 0, 1)
    single = paired_test([[1.0], [0.0]], [[1], [1]], ["g"], **NAMES, **SETTINGS)
    assert (single.difference, single.lower, single.upper, single.p_value) == (1, -1, 1, 1)


def test_weights_of_both_systems_count() -> None:
    values, weights = [[0.5, 1.0], [0.0, 1.0]], [[2, 2], [1, 3]]
    found = paired_test(values, weights, own_groups(2), **NAMES, **SETTINGS)
    assert found.difference == pytest.approx(3 / 4 - 3 / 4)


def test_samples_without_a_score_are_left_out() -> None:
    values = [[1.0, float("nan"), 0.0], [1.0, 1.0, float("nan")]]
    found = paired_test(values, np.ones((2, 3)), own_groups(3), **NAMES, **SETTINGS)
    assert (found.num_samples, found.difference) == (1, 0)
    with pytest.raises(EvaluationError, match="a and b need scores of m"):
        paired_test([[1.0, float("nan")], [float("nan"), 1.0]], np.ones((2, 2)), own_groups(2),
                    **NAMES, **SETTINGS)  # fmt: skip


def test_p_values_are_calibrated() -> None:
    """Under no difference about 5 % of the tests reject at 5 %."""
    rejected = 0
    for seed in range(200):
        values = np.random.default_rng(seed).random((2, 30))
        found = paired_test(
            values, np.ones((2, 30)), own_groups(30), **NAMES, **{**SETTINGS, "num_bootstrap": 200}
        )
        rejected += found.p_value <= 0.05
    assert 2 <= rejected <= 22


# McNemar, Holm, the detectable difference


def test_mcnemar_is_the_binomial_test_of_the_discordant() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * 11 / 2**10)
    assert 0 < mcnemar(20_000, 19_000) < 1e-5


def test_a_paired_test_counts_the_discordant() -> None:
    values = np.array([[1, 1, 1, 0, 1, 1.0], [0, 0, 1, 1, 1, float("nan")]])
    found = paired_test(values, np.ones((2, 6)), own_groups(6), **NAMES, **SETTINGS)
    assert (found.only_first, found.only_second) == (2, 1)
    assert found.mcnemar_p == 1
    grouped = paired_test(values, np.ones((2, 6)), list("aabbcc"), **NAMES, **SETTINGS)
    assert (grouped.only_first, grouped.mcnemar_p) == (2, None)
    graded = paired_test(values * 0.5, np.ones((2, 6)), own_groups(6), **NAMES, **SETTINGS)
    assert graded.only_first is graded.mcnemar_p is None


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_detectable_difference_shrinks_with_groups_and_knows_the_pilot() -> None:
    worst = [detectable_difference(number, confidence=0.95) for number in (25, 100, 400)]
    assert worst == sorted(worst, reverse=True)
    assert worst[1] == pytest.approx(2.8016 * 0.5**0.5 / 10 + 0.01, abs=1e-3)
    pilot: Any = {"value": 0.0, "standard_error": 0.0, "pilot_groups": 50}
    nothing_right = detectable_difference(100, confidence=0.95, **pilot)
    assert 0.05 < nothing_right < worst[1]
    pilot = {"value": 0.95, "standard_error": 0.02, "pilot_groups": 100}
    down = detectable_difference(100, confidence=0.95, mode="min", **pilot)
    assert down > detectable_difference(100, confidence=0.95, **pilot)
    rate = {"value": 1.4, "standard_error": 0.1, "pilot_groups": 100}
    assert detectable_difference(100, confidence=0.95, is_share=False, **rate) == pytest.approx(
        2.8016 * 2**0.5 * 0.1, abs=1e-4
    )
    assert detectable_difference(1, confidence=0.95) == 1


# corrected_winner


def test_correction_removes_the_gain_of_picking() -> None:
    """32 equal trials of true score 0.6 on 100 samples, 40 sweeps."""
    naive, corrected = [], []
    for seed in range(40):
        values = trials(32, 100, seed)
        found = corrected_winner(
            values,
            np.ones_like(values),
            own_groups(100),
            mode="max",
            **{**SETTINGS, "num_bootstrap": 200},
        )
        naive.append(values.mean(axis=1).max())
        corrected.append(found.value)
    assert np.mean(naive) > 0.68
    assert np.mean(corrected) == pytest.approx(0.6, abs=0.02)


def test_correction_leaves_a_clear_winner_alone() -> None:
    values = trials(8, 200, seed=0) * 0.2
    values[3] = np.random.default_rng(0).uniform(0.7, 0.9, 200)
    arguments: Any = (np.ones_like(values), own_groups(200))
    found = corrected_winner(values, *arguments, mode="max", **SETTINGS)
    assert found.value == pytest.approx(values[3].mean(), abs=0.002)
    assert found.lower < found.value < found.upper
    least = corrected_winner(1 - values, *arguments, mode="min", **SETTINGS)
    assert least.value == pytest.approx(1 - found.value)


def test_correction_for_clusters_nan_and_single_groups() -> None:
    values = trials(3, 40, seed=0)
    values[1] = float("nan")
    groups = [f"g{number // 4}" for number in range(40)]
    found = corrected_winner(values, np.ones_like(values), groups, mode="max", **SETTINGS)
    assert 0 < found.lower <= found.value <= found.upper < 1
    single = corrected_winner(
        [[0.2, 0.4], [0.5, 0.7]], np.ones((2, 2)), ["g", "g"], mode="max", **SETTINGS
    )
    assert (single.value, single.lower, single.upper) == (pytest.approx(0.6), 0, 1)
    with pytest.raises(EvaluationError, match="no trial"):
        corrected_winner([[float("nan")]], [[1]], ["g"], mode="max", **SETTINGS)


# indistinguishable


@pytest.mark.parametrize("mode", ["max", "min"])
def test_list_holds_the_equals_and_drops_the_worse(mode: Any) -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 0.2, 80)
    quality = np.array([0.8, 0.3, 0.8, 0.8, 0.5])
    values = quality[:, None] + difficulty + generator.normal(0, 0.05, (5, 80))
    values[4, :] = float("nan")
    values = values if mode == "max" else -values
    winner = int(np.nanargmax(values[:4].mean(axis=1) * (1 if mode == "max" else -1)))
    found = indistinguishable(
        values, np.ones_like(values), own_groups(80), winner=winner, mode=mode, **SETTINGS
    )
    assert winner in found
    assert set(found) == {0, 2, 3}


def test_list_with_identical_trials_and_one_group() -> None:
    values = trials(1, 20, seed=0).repeat(3, axis=0)
    arguments: Any = {"winner": 1, "mode": "max", **SETTINGS}
    assert indistinguishable(values, np.ones_like(values), own_groups(20), **arguments) == [0, 1, 2]
    groups = ["g"] * 20
    assert indistinguishable(values, np.ones_like(values), groups, **arguments) == [0, 1, 2]
    with pytest.raises(EvaluationError, match="trial 7 of 3"):
        indistinguishable(values, np.ones_like(values), groups, winner=7, mode="max", **SETTINGS)


def test_best_trial_stays_in_the_list() -> None:
    """Trial 0 is as good as any: it must be in the list of nearly every sweep."""
    kept = 0
    for seed in range(60):
        values = trials(20, 60, seed)
        winner = int(values.mean(axis=1).argmax())
        kept += 0 in indistinguishable(
            values,
            np.ones_like(values),
            own_groups(60),
            winner=winner,
            mode="max",
            **{**SETTINGS, "num_bootstrap": 200},
        )
    assert kept >= 53


def test_large_sweeps_take_seconds_at_most() -> None:
    values = np.random.default_rng(0).random((64, 500))
    arguments: Any = (values, np.ones_like(values), own_groups(500))
    options: Any = {"confidence": 0.95, "num_bootstrap": 2000, "seed": 0, "mode": "max"}
    start = time.perf_counter()
    corrected_winner(*arguments, **options)
    indistinguishable(*arguments, winner=int(values.mean(axis=1).argmax()), **options)
    assert time.perf_counter() - start < 10  # 0.4 s on an idle core
