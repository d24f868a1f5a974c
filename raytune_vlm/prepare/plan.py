"""The plan: which samples make up which optimizer step; a pure function of index and settings.

An epoch is an order of the training samples, cut into *units*: single samples, or packs of samples
that share one row of a batch. A global step is `batch_size` units, whatever the number of workers;
a step that reaches the end of an epoch goes on into the next one, so nothing is dropped.
`(digest, step)` is all that resuming needs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass

import numpy as np

from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.errors import DataError
from raytune_vlm.prepare.packing import best_fit_decreasing

LENGTH_GROUP_STEPS = 64
"""With length grouping, so many steps' worth of shuffled samples are sorted together."""


@dataclass(frozen=True)
class PlanSpec:
    """What a plan depends on, besides the samples.

    Attributes
    ----------
    batch_size
        Units per optimizer step, over all workers.
    seed
        Seed of the shuffles.
    pack_length
        Tokens that a pack may hold; None: every sample is a unit of its own.
    group_by_length
        Make steps of samples of about the same length.
    weights
        Share of each source, by its number, 0 for one that trains nothing; None: every sample once
        an epoch.
    """

    batch_size: int
    seed: int
    pack_length: int | None = None
    group_by_length: bool = False
    weights: tuple[float, ...] | None = None


def plan_spec(experiment: ExperimentConfig) -> PlanSpec:
    """What an experiment makes of its training samples."""
    sources = experiment.data.sources
    weighted = any(source.weight is not None for source in sources)
    return PlanSpec(
        batch_size=experiment.train.batch_size,
        seed=experiment.seed,
        pack_length=experiment.train.pack_tokens,
        group_by_length=experiment.train.group_by_length,
        weights=tuple(source.weight or 0.0 for source in sources) if weighted else None,
    )


def resolved_steps(experiment: ExperimentConfig, plan: Plan) -> int:
    """Optimizer steps of a complete run, be it by `train.max_steps` or by `train.epochs`.

    A pure function of experiment and prepared data: a resumed sweep finds the same.
    """
    epochs = experiment.train.epochs
    return experiment.train.max_steps if epochs is None else plan.num_steps(epochs)


@dataclass(frozen=True)
class Epoch:
    """One pass: unit u holds the samples `rows[starts[u] : starts[u + 1]]`."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


class Plan:
    """Global steps over shuffled epochs.

    Parameters
    ----------
    lengths
        int `[samples]`: tokens of each training sample; at least one sample.
    sources
        int `[samples]`: the number of the source of each sample.
    spec
        See `PlanSpec`.
    data_digest
        Digest of the prepared data; goes into the plan's own.

    Raises
    ------
    DataError
        If a source has a weight but no samples.
    """

    def __init__(
        self, lengths: np.ndarray, sources: np.ndarray, spec: PlanSpec, *, data_digest: str
    ) -> None:
        self.spec = spec
        self._lengths = lengths
        weights = spec.weights or ()
        self._sources = [np.flatnonzero(sources == number) for number in range(len(weights))]
        for number, (members, weight) in enumerate(zip(self._sources, weights, strict=True)):
            if weight and not len(members):
                raise DataError(f"data.sources[{number}] has a weight but no training samples")
        # The lengths too: packs and groups follow from them.
        content = hashlib.blake2b(lengths.astype(np.int64).tobytes(), digest_size=16)
        content.update(sources.astype(np.int64).tobytes())
        self.digest = digest_of(
            {"spec": asdict(spec), "samples": content.hexdigest(), "data": data_digest}
        )
        self._first_units = [0]
        """Number of the first unit of each epoch that is known so far."""
        self._kept: dict[int, Epoch] = {}

    def step(self, number: int) -> list[np.ndarray]:
        """The units of optimizer step `number` (from 0): the rows of each, int64."""
        wanted = number * self.spec.batch_size
        units: list[np.ndarray] = []
        epoch = self._epoch_of(wanted)
        while len(units) < self.spec.batch_size:
            content = self.epoch(epoch)
            first = self._first_units[epoch]
            for unit in range(wanted - first, len(content)):
                units.append(content.rows[content.starts[unit] : content.starts[unit + 1]])
                if len(units) == self.spec.batch_size:
                    return units
            epoch, wanted = epoch + 1, first + len(content)
        return units

    def num_steps(self, epochs: float) -> int:
        """The steps that use every unit of so many epochs; at least one."""
        whole, rest = int(epochs), epochs % 1
        if self.spec.pack_length is None:
            units = epochs * len(self._lengths)
        else:
            units = float(sum(len(self.epoch(number)) for number in range(whole)))
            units += rest * len(self.epoch(whole)) if rest else 0
        return max(1, math.ceil(units / self.spec.batch_size - 1e-9))

    def rows(self, number: int) -> np.ndarray:
        """All samples of a step, in the order of its units."""
        return np.concatenate(self.step(number))

    def epoch(self, number: int) -> Epoch:
        """One epoch's units; the last two that were asked for are kept."""
        if number not in self._kept:
            self._find_first_unit(number)
            epoch = self._make(number)
            self._kept = {k: v for k, v in self._kept.items() if k == number - 1} | {number: epoch}
            if len(self._first_units) == number + 1:
                self._first_units.append(self._first_units[number] + len(epoch))
        return self._kept[number]

    def _epoch_of(self, unit: int) -> int:
        """The epoch that a unit, counted from the very first, belongs to."""
        if self.spec.pack_length is None:
            return unit // len(self._lengths)
        while self._first_units[-1] <= unit:
            self.epoch(len(self._first_units) - 1)
        return int(np.searchsorted(self._first_units, unit, side="right")) - 1

    def _find_first_unit(self, epoch: int) -> None:
        if self.spec.pack_length is None:
            count = len(self._lengths)
            self._first_units = [number * count for number in range(epoch + 2)]
        while len(self._first_units) <= epoch:
            self.epoch(len(self._first_units) - 1)

    def _make(self, number: int) -> Epoch:
        spec = self.spec
        generator = np.random.Generator(np.random.PCG64([spec.seed, number]))
        order = self._order(number, generator)
        if spec.pack_length is not None:
            return self._packed(order, generator)
        if spec.group_by_length:
            order = self._grouped(order, self._first_units[number], generator)
        return Epoch(order, np.arange(len(order) + 1))

    def _order(self, epoch: int, generator: np.random.Generator) -> np.ndarray:
        """The rows of an epoch, shuffled; by the exact quotas of the mixture where it has one."""
        if self.spec.weights is None:
            return generator.permutation(len(self._lengths))
        *earlier, now = exact_quotas(self.spec.weights, len(self._lengths), epoch + 1)
        before = np.array([np.zeros(len(now)), *earlier]).sum(axis=0).astype(np.int64)
        rows, keys = [], []
        for number, (members, quota) in enumerate(zip(self._sources, now, strict=True)):
            rows.append(self._drawn(number, members, int(before[number]), quota))
            # The k-th of q stands near (k + u) / q of the epoch: every stretch of it has the
            # quotas of the whole.
            offsets = generator.random(quota)
            keys.append((np.arange(quota) + offsets) / max(quota, 1))
        return np.concatenate(rows)[np.argsort(np.concatenate(keys), kind="stable")]

    def _drawn(self, source: int, members: np.ndarray, first: int, count: int) -> np.ndarray:
        """`count` rows of a source from position `first` of its own endless shuffled passes."""
        taken = []
        while count > 0:
            turn, offset = divmod(first, len(members))
            generator = np.random.Generator(np.random.PCG64([self.spec.seed, source, turn, 1]))
            piece = generator.permutation(members)[offset : offset + count]
            taken.append(piece)
            first, count = first + len(piece), count - len(piece)
        return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)

    def _packed(self, order: np.ndarray, generator: np.random.Generator) -> Epoch:
        assert self.spec.pack_length is not None
        bins = best_fit_decreasing(self._lengths[order], self.spec.pack_length)
        # Packs in random order: their numbers rise with their fill.
        place = generator.permutation(int(bins.max()) + 1)[bins]
        by_unit = np.argsort(place, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(place))])
        return Epoch(order[by_unit], starts)

    def _grouped(
        self, order: np.ndarray, first_unit: int, generator: np.random.Generator
    ) -> np.ndarray:
        """The order with samples of like length in one step, steps still in random order."""
        size = self.spec.batch_size
        head = min(-first_unit % size, len(order))  # completes the step of the epoch before
        steps = (len(order) - head) // size
        body = order[head : head + steps * size]
        window = size * LENGTH_GROUP_STEPS
        group = np.arange(len(body)) // window
        body = body[np.lexsort((self._lengths[body], group))].reshape(steps, size)
        body = body[generator.permutation(steps)]
        return np.concatenate([order[:head], body.ravel(), order[head + steps * size :]])

    def efficiency(self, epoch: int = 0) -> float:
        """Share of an epoch's packs that is tokens of samples; 1.0 without packing."""
        if self.spec.pack_length is None:
            return 1.0
        content = self.epoch(epoch)
        return float(self._lengths[content.rows].sum() / (len(content) * self.spec.pack_length))


def exact_quotas(weights: tuple[float, ...], total: int, epochs: int) -> list[list[int]]:
    """The draws from each source in each of the first epochs of `total` draws.

    Whole numbers in the proportion of the weights by largest remainders (Hamilton's method); what
    rounding takes from a source in one epoch it is given back in a later one.
    """
    owed = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights) * total
    found = []
    for _ in range(epochs):
        owed += shares
        quotas = np.maximum(np.floor(owed + 1e-9), 0).astype(np.int64)
        rest = total - int(quotas.sum())
        order = np.argsort(quotas - owed, kind="stable")  # the most owed first
        if rest > 0:
            quotas[order[:rest]] += 1
        for place in order[::-1][: max(-rest, 0)]:
            quotas[place] -= 1
        owed -= quotas
        found.append(quotas.tolist())
    return found


def micro_batches(
    units: list[np.ndarray],
    lengths: np.ndarray,
    *,
    world_size: int,
    max_units: int,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """The places of a step's units, by micro-batch, longest first.

    Parameters
    ----------
    units
        Rows of each unit.
    lengths
        Tokens of each sample.
    world_size
        Each of so many ranks gets at least one micro-batch, if there are units enough.
    max_units
        Most units of a micro-batch.
    max_tokens
        Most tokens of a micro-batch, its padding included; a unit that is longer stands alone.
    """
    sizes = [int(lengths[rows].sum()) for rows in units]
    order = sorted(range(len(units)), key=lambda place: -sizes[place])
    limit = max(1, min(max_units, -(-len(units) // world_size)))
    batches: list[list[int]] = []
    longest = 0
    for place in order:
        last = batches[-1] if batches else None
        fits = (
            last is not None
            and len(last) < limit
            and (max_tokens is None or (len(last) + 1) * longest <= max_tokens)
        )
        if fits and last is not None:
            last.append(place)
        else:
            batches.append([place])
            longest = sizes[place]
    while len(batches) < min(world_size, len(units)):
        largest = max(batches, key=len)
        half = len(largest) // 2
        batches.append(largest[half:])
        del largest[half:]
    return batches
