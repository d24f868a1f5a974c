"""How good the intervals, tests and corrections of `evaluate/statistics` are, by simulation.

python benchmarks/statistics_simulation.py [--share 3]

Everything is drawn anew from known truths: the coverage of the intervals, the size of the tests,
the bias of the winner's score, the power at the detectable difference. `--share` takes a part or a
multiple of the repetitions. Prints Markdown tables; those of docs/statistics.md are from here.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_vlm.evaluate.statistics import (
    corrected_winner,
    detectable_difference,
    estimate,
    holm,
    indistinguishable,
    mcnemar,
    paired_test,
)

Floats = NDArray[np.float64]
OPTIONS: dict[str, Any] = {"confidence": 0.95, "num_bootstrap": 400, "seed": 0}
NAMES: dict[str, Any] = {"metric": "m", "first": "a", "second": "b"}

SIZES = {
    "single": lambda generator, groups: np.ones(groups, dtype=int),
    "equal (5)": lambda generator, groups: np.full(groups, 5),
    "unequal (1 to 20)": lambda generator, groups: generator.geometric(0.25, groups).clip(1, 20),
}
"""How many samples the groups have."""


def shares(generator: np.random.Generator, sizes: Any, p: float, icc: float) -> Floats:
    """0/1 values whose groups have chances from a beta law: mean p, correlation `icc` within."""
    if icc == 0:
        chances = np.full(len(sizes), p)
    else:
        scale = (1 - icc) / icc
        chances = generator.beta(p * scale, (1 - p) * scale, len(sizes))
    return (generator.random(int(sizes.sum())) < np.repeat(chances, sizes)).astype(float)


def coverage(kind: str, num_groups: int, p: float, icc: float, repeats: int) -> tuple[float, float]:
    """The share of intervals that hold p, and their mean width."""
    held, width = 0, 0.0
    for seed in range(repeats):
        generator = np.random.default_rng([seed, num_groups, int(p * 1000)])
        sizes = SIZES[kind](generator, num_groups)
        values = shares(generator, sizes, p, icc)
        groups = [str(group) for group in np.repeat(np.arange(num_groups), sizes)]
        found = estimate(values, np.ones_like(values), groups, **OPTIONS)
        held += found.lower <= p <= found.upper
        width += found.upper - found.lower
    return held / repeats, width / repeats


def graded_coverage(num_samples: int, right: float, repeats: int) -> float:
    """The same for graded scores: 1 with chance `right`, else uniform in [0, 1]."""
    truth, held = right + (1 - right) / 2, 0
    groups = [str(number) for number in range(num_samples)]
    for seed in range(repeats):
        generator = np.random.default_rng([seed, num_samples])
        values = np.where(generator.random(num_samples) < right, 1, generator.random(num_samples))
        found = estimate(values, np.ones(num_samples), groups, **OPTIONS)
        held += found.lower <= truth <= found.upper
    return held / repeats


def paired_sizes(num_samples: int, p: float, repeats: int) -> dict[str, float]:
    """How often tests of two equally good systems reject at 5 %."""
    rejected = {"exchange": 0, "bootstrap interval": 0, "McNemar": 0}
    groups = [str(number) for number in range(num_samples)]
    for seed in range(repeats):
        values = (np.random.default_rng([seed, 7]).random((2, num_samples)) < p).astype(float)
        found = paired_test(values, np.ones_like(values), groups, **NAMES, **OPTIONS)
        rejected["exchange"] += found.p_value <= 0.05
        rejected["bootstrap interval"] += found.lower > 0 or found.upper < 0
        rejected["McNemar"] += found.mcnemar_p is not None and found.mcnemar_p <= 0.05
    return {name: count / repeats for name, count in rejected.items()}


def family_errors(num_trials: int, num_samples: int, repeats: int) -> tuple[float, float]:
    """How often any of T trials that equal the base is called different: plainly, after Holm.

    By McNemar's test; the base's own draw is shared, so the tests go together.
    """
    plain = adjusted = 0
    for seed in range(repeats):
        values = np.random.default_rng([seed, 11]).random((num_trials + 1, num_samples)) < 0.6
        first = (values[1:] & ~values[0]).sum(axis=1)
        second = (~values[1:] & values[0]).sum(axis=1)
        p_values = [mcnemar(int(a), int(b)) for a, b in zip(first, second, strict=True)]
        plain += min(p_values) <= 0.05
        adjusted += min(holm(p_values)) <= 0.05
    return plain / repeats, adjusted / repeats


def winner_bias(
    num_trials: int, num_samples: int, spread: float, repeats: int
) -> tuple[float, float, float, float]:
    """Bias of the naive and of the corrected score, whether the interval holds the winner's true
    score, and how often the truly best trial is missing from the list of those not told apart.

    True scores are normal around 0.6 with the given spread; documents share their difficulty.
    """
    naive, corrected, held, lost = [], [], 0, 0
    groups = [str(number) for number in range(num_samples)]
    for seed in range(repeats):
        generator = np.random.default_rng([seed, 13])
        truths = (0.6 + spread * generator.normal(size=num_trials)).clip(0.02, 0.98)
        # One half of the variance is the document's: the same uniform number for all trials.
        shared = generator.random(num_samples) < 0.5
        draws = np.where(
            shared, generator.random(num_samples), generator.random((num_trials, num_samples))
        )
        values = (draws < truths[:, None]).astype(float)
        scores = values.mean(axis=1)
        winner, best = int(scores.argmax()), int(truths.argmax())
        arguments: Any = (values, np.ones_like(values), groups)
        found = corrected_winner(*arguments, mode="max", **OPTIONS)
        naive.append(scores[winner] - truths[winner])
        corrected.append(found.value - truths[winner])
        held += found.lower <= truths[winner] <= found.upper
        kept = indistinguishable(*arguments, winner=winner, mode="max", **OPTIONS)
        lost += best not in kept
    return float(np.mean(naive)), float(np.mean(corrected)), held / repeats, lost / repeats


def power(num_samples: int, p: float, repeats: int) -> tuple[float, float, float]:
    """The detectable difference from a pilot of the base, and how often the exchange test and the
    interval find it."""
    groups = [str(number) for number in range(num_samples)]
    error = (p * (1 - p) / num_samples) ** 0.5
    difference = detectable_difference(
        num_samples,
        confidence=OPTIONS["confidence"],
        value=p,
        standard_error=error,
        pilot_groups=num_samples,
    )
    tested = apart = 0
    for seed in range(repeats):
        draws = np.random.default_rng([seed, 17]).random((2, num_samples))
        values = (draws < [[p + difference], [p]]).astype(float)
        test = paired_test(values, np.ones_like(values), groups, **NAMES, **OPTIONS)
        tested += test.p_value <= 0.05
        apart += test.lower > 0
    return difference, tested / repeats, apart / repeats


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="part of the repetitions")
    share = parser.parse_args().share
    began = time.monotonic()

    def times(number: int) -> int:
        return max(10, int(number * share))

    print("| groups | samples a group | p | correlation | coverage of 95 % | width |")
    print("|---:|---|---:|---:|---:|---:|")
    for num_groups in (30, 100, 300):
        for kind in SIZES:
            for p in (0.02, 0.1, 0.5, 0.9, 0.98):
                icc = 0.0 if kind == "single" else 0.3
                held, width = coverage(kind, num_groups, p, icc, times(300))
                print(f"| {num_groups} | {kind} | {p} | {icc} | {held:.3f} | {width:.3f} |")
    print("\n| graded scores: samples | share of ones | coverage of 95 % |\n|---:|---:|---:|")
    for number, right in ((50, 0.95), (100, 0.9), (100, 0.5), (300, 0.98)):
        print(f"| {number} | {right} | {graded_coverage(number, right, times(500)):.3f} |")
    print("\n| equal systems: samples | p | exchange | bootstrap interval | McNemar |")
    print("|---:|---:|---:|---:|---:|")
    for number, p in ((20, 0.5), (50, 0.1), (100, 0.6), (300, 0.95)):
        sizes = paired_sizes(number, p, times(1000))
        print(f"| {number} | {p} | " + " | ".join(f"{rate:.3f}" for rate in sizes.values()) + " |")
    print(
        "\n| trials equal to the base | any rejected | any rejected after Holm |\n|---:|---:|---:|"
    )
    for trials in (4, 16, 64):
        plain, adjusted = family_errors(trials, 100, times(1000))
        print(f"| {trials} | {plain:.3f} | {adjusted:.3f} |")
    print("\n| trials x documents | spread of true scores | naive bias | corrected bias ", end="")
    print("| 95 % interval holds | best missing from the list |\n|---|---:|---:|---:|---:|---:|")
    for spread in (0.0, 0.02, 0.05, 0.1):
        naive, corrected, held, lost = winner_bias(64, 100, spread, times(100))
        print(
            f"| 64 x 100 | {spread} | {naive:+.4f} | {corrected:+.4f} | {held:.3f} | {lost:.3f} |"
        )
    print("\n| samples | p of the base | detectable difference | power: test | power: interval |")
    print("|---:|---:|---:|---:|---:|")
    for number, p in ((50, 0.5), (100, 0.3), (100, 0.05), (400, 0.8)):
        difference, tested, apart = power(number, p, times(400))
        print(f"| {number} | {p} | {difference:.3f} | {tested:.3f} | {apart:.3f} |")
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
