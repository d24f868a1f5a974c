"""The decision of a sweep: `result.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

from raytune_vlm.records.estimate import MetricEstimate
from raytune_vlm.records.reading import as_record


@dataclass(frozen=True)
class PairedTest:
    """A paired comparison of two systems on the same samples (`first` minus `second`)."""

    metric: str
    first: str
    second: str
    difference: float
    lower: float
    upper: float
    p_value: float
    num_samples: int
    adjusted_p: float | None = None
    """After Holm, for the `num_tests` comparisons that were made together; None if alone."""
    num_tests: int = 1
    only_first: int | None = None
    """Samples that only the first gets right, where every score is 0 or 1."""
    only_second: int | None = None
    mcnemar_p: float | None = None
    """Of McNemar's exact test, where each sample is also a group of its own."""


@dataclass(frozen=True)
class Replicate:
    """A recipe trained with another seed, scored on `select` at its best step."""

    seed: int
    value: float | None
    """None if it failed; `failure` says why."""
    failure: str | None = None
    trial_id: str = ""
    """Whose recipe; of sweeps before `sweep.replicate_top` the winner's."""


@dataclass(frozen=True)
class SeedSpread:
    """What a recipe scores on `select` with other seeds than the one it was picked with."""

    trial_id: str
    picked: float
    """With the seed of the sweep: flattered, where it was picked by this."""
    values: list[float]
    num_failed: int

    @property
    def mean(self) -> float | None:
        """Over the other seeds; None if all failed."""
        return fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over the other seeds; None for fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class GuardScore:
    """One metric of one benchmark of `evaluation.guard`, for one role."""

    benchmark: str
    metric: str
    role: str
    trial_id: str
    estimate: MetricEstimate
    num_samples: int
    left_out: int
    """Rows that could not be asked."""
    against_base: PairedTest | None = None
    """This role minus the base model, on the same questions."""


@dataclass(frozen=True)
class SweepResult:
    """`result.json`: the decision of a sweep, written once at its end."""

    metric: str
    mode: Literal["max", "min"]
    winner: str
    winner_step: int
    default: str | None
    """The trial that ran the experiment's own recipe, if the sweep included it."""
    naive: float
    """The winner's score on `select`: inflated by having been picked."""
    corrected: MetricEstimate | None
    """The same with the selection bias removed (bootstrap over trials x samples)."""
    report: dict[str, str]
    """Role (`base`, `default`, `winner`) -> trial id scored on the `report` split."""
    paired: list[PairedTest]
    indistinguishable: list[str]
    """Trials whose `select` score cannot be told from the winner's, cheapest first."""
    num_report_touches: int
    seconds: float
    replicates: list[Replicate] = field(default_factory=list)
    replicated: dict[str, float] = field(default_factory=dict)
    """Trial whose recipe was trained with other seeds -> its own score, the best first."""
    against_base: list[PairedTest] = field(default_factory=list)
    """Every trial at its last rung against the base model, on `select`."""
    detectable: dict[str, float] = field(default_factory=dict)
    """Split -> the smallest difference in the metric that a paired test on it would likely find."""
    clean: dict[str, MetricEstimate] = field(default_factory=dict)
    """Role -> score on the samples of `report` that do not overlap `train`, if some do."""
    num_clean: int | None = None
    """How many samples of `report` those are; None if no sample overlaps."""
    objectives: dict[str, str] = field(default_factory=dict)
    """With several: objective -> `max` or `min`, the deciding one first."""
    front: list[dict[str, Any]] = field(default_factory=list)
    """The Pareto front: `trial_id`, `step` and a value for each objective."""
    infeasible: dict[str, str] = field(default_factory=dict)
    """Trial that broke a constraint, trained or not -> which."""
    guard: list[GuardScore] = field(default_factory=list)
    """What the benchmarks of `evaluation.guard` say of base, default and winner."""
    seeds_of_winner: dict[str, float] = field(default_factory=dict)
    """With `sweep.scheduler.seeds`: the trials of the winner's recipe -> score on `select` at the
    winner's step. The recipe was picked by their mean, the winner is the best of them."""

    def seeds(self) -> list[SeedSpread]:
        """The recipes that were trained with other seeds, the best by the sweep's own first."""
        own = self.replicated or {self.winner: self.naive}
        found = []
        for trial_id, picked in own.items():
            entries = [r for r in self.replicates if (r.trial_id or self.winner) == trial_id]
            values = [entry.value for entry in entries if entry.value is not None]
            if entries:
                failed = len(entries) - len(values)
                found.append(SeedSpread(trial_id, picked, values, failed))
        return found

    def own_seeds(self) -> SeedSpread | None:
        """The trials of the winner's recipe, by whose mean it was picked; None with one seed."""
        values = [*self.seeds_of_winner.values()]
        return SeedSpread(self.winner, self.naive, values, 0) if values else None

    def best_by_seeds(self) -> str | None:
        """The trial with the best mean over other seeds; None where there are not two of them."""
        sign = 1.0 if self.mode == "max" else -1.0
        means = {x.trial_id: sign * x.mean for x in self.seeds() if x.mean is not None}
        return max(means, key=means.__getitem__) if len(means) > 1 else None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SweepResult:
        return as_record(cls, value)
