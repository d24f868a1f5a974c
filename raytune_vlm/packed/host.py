"""The host: one frozen base, and one step of several slots at a time.

`exact` takes the slots one after another, each as it would run alone: bit-equal on CPU. `fast` puts
their micro-batches into one, the base works on all rows at once and every row goes through its own
slot's adapter (`routing`): equal to rounding. Loss, clipping, update, learning rate and data cursor
are each slot's own either way.

Several workers do the same slots in the same order, each its part of every slot's global batch. A
packed step adds up losses and gradients of all its slots in one message each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TypeVar

import torch

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.collate.features import drops
from raytune_vlm.errors import (
    AuditFailed,
    InfrastructureError,
    ModelError,
    TrialDiverged,
    first_line,
)
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import unmixable
from raytune_vlm.packed.routing import Share, routed
from raytune_vlm.packed.slot import Slot
from raytune_vlm.packed.super_batch import joined, length, num_rows
from raytune_vlm.packed.update import Gradients
from raytune_vlm.prepare.feed import MicroBatch
from raytune_vlm.records import read_json, write_json
from raytune_vlm.train.backends import BACKENDS
from raytune_vlm.train.backends.ddp import add_up
from raytune_vlm.train.memory import infeasible_without_memory
from raytune_vlm.train.output_layer import TokenLosses
from raytune_vlm.train.run import Run
from raytune_vlm.train.step_metrics import StepMetrics, Sums, over_ranks
from raytune_vlm.train.world import World

_Found = TypeVar("_Found")
Mode = Literal["exact", "fast"]
Outcome = StepMetrics | Exception
"""What a step gave: its metrics, or the error that ends this slot's trial and no other."""

ONE_WORKER = World()

MET_BY_ALL = (TrialDiverged, AuditFailed)
"""What ends a trial on every worker in the same step; any other error may be of one alone."""


@dataclass(frozen=True)
class _Failure:
    """Why a packed step failed on a rank."""

    what: str
    fewer: int
    """How many slots to pack from here on."""
    quoted: str

    @classmethod
    def of(cls, error: Exception, count: int) -> _Failure:
        """What an error with so many slots says."""
        if isinstance(error, torch.OutOfMemoryError):
            fewer = (count + 1) // 2 if count > 2 else 1
            return cls("out of memory", fewer, first_line(error))
        return cls(type(error).__name__, 1, first_line(error))


def step_alone(run: Run) -> Outcome:
    """One optimizer step of a run whose adapter is on the base."""
    try:
        return run.step()
    except Exception as error:
        return error


class Host:
    """Steps slots that share a base.

    Parameters
    ----------
    base
        The resident base; every slot's run was made on it.
    world
        This worker's place; every rank calls the same methods with the same slots.
    limit_file
        Where `together` is kept for workers that start again; None: nowhere.
    """

    def __init__(
        self, base: Base, mode: Mode, world: World = ONE_WORKER, *, limit_file: Path | None = None
    ) -> None:
        self._base, self._mode, self._world = base, mode, world
        self._limit_file = limit_file
        self.together: int | None = world.broadcast(self._kept())
        """The most slots of a packed step, once more were too many; the same on all ranks."""
        self._drops = any(map(drops, base.model.modules()))
        self._losses = TokenLosses(base.model)
        self.notes: list[str] = []
        """What is to be said of memory and errors; who reads it empties it."""
        self.seconds: list[float] = []
        """What each slot took of the last `step`; of a packed one its part by the tokens fed."""

    def obstacle(self, run: Run) -> str | None:
        """Why a run steps by itself in mode `fast`; None if it is packed."""
        experiment = run.experiment
        if experiment.model.dtype == "float16":
            return "model.dtype=float16: every trial scales its loss itself"
        if experiment.train.fsdp2.compute_dtype == "float16":
            return "train.fsdp2.compute_dtype=float16: every trial scales its loss itself"
        if experiment.train.pack_tokens is not None:
            return "train.pack_tokens: a row holds several samples"
        if experiment.train.distillation.is_on:
            return "train.distillation: its output layer is used in chunks of its own tokens"
        family = self._base.family
        if not family.text_beside_images:
            return f"rows in the cross-attention of {family.model_type} are tiles, not samples"
        if experiment.lora.dropout and family.prompt in ("encoder-decoder", "image-encoder"):
            return f"lora.dropout: {family.model_type} has an encoder with rows of other lengths"
        if self._drops:
            return f"{family.model_type} has dropout of its own, the same for all rows"
        return unmixable(experiment.lora)

    def step(self, slots: Sequence[Slot]) -> list[Outcome]:
        """One optimizer step of each slot, in their order.

        Raises
        ------
        Exception
            With several workers, or on a sharded base: what may have struck one rank alone. The
            others wait for it or are about to, so all have to start again.
        """
        outcomes: dict[int, Outcome] = {}
        taken: dict[int, float] = {}
        waiting, began = list(range(len(slots))), time.monotonic()
        while waiting:
            numbers = self._next([slots[number] for number in waiting])
            group = [waiting[number] for number in numbers]
            found = self._step([slots[number] for number in group])
            if found is not None:
                outcomes |= dict(zip(group, found, strict=True))
                waiting = [number for number in waiting if number not in outcomes]
                began, before = time.monotonic(), began
                taken |= dict(zip(group, _shares(found, began - before), strict=True))
        self.seconds = [taken[number] for number in range(len(slots))]
        return [outcomes[number] for number in range(len(slots))]

    def _next(self, slots: Sequence[Slot]) -> list[int]:
        """Places of the first slot and of those that can be packed with it."""
        first = slots[0].run
        if self._mode == "exact" or self.obstacle(first) is not None:
            return [0]
        recomputed = first.config.activation_checkpointing
        alike = [
            number
            for number, slot in enumerate(slots)
            if slot.run.config.activation_checkpointing == recomputed
            and self.obstacle(slot.run) is None
        ]
        return alike[: self.together]

    def _step(self, slots: Sequence[Slot]) -> list[Outcome] | None:
        """One step of slots that fit together; None if it has to be tried again with fewer."""
        if len(slots) == 1:
            with slots[0].mounted() as run:
                return [self._own(step_alone(run))]
        began = time.monotonic()
        states = [slot.random.state for slot in slots]
        failure, gradients = None, None
        try:
            sums = self._gradients(slots)
            if self._world.size == 1:  # else they are not whole yet
                gradients = Gradients([slot.flat for slot in slots])
        except Exception as error:
            self._leave_if_sharded(slots, error)
            sums, failure = [Sums(failed=1.0) for _ in slots], _Failure.of(error, len(slots))
        sums = over_ranks(sums, self._world)
        if sums[0].failed:
            for slot, state in zip(slots, states, strict=True):
                slot.random.state = state
                slot.run.forget_gradients()
            self._pack_fewer(len(slots), failure)
            return None
        if gradients is None:
            add_up([parameter for slot in slots for parameter in slot.trained], self._world)
            gradients = Gradients([slot.flat for slot in slots])
        return _finished(slots, sums, gradients, began, self._own)

    def _own(self, outcome: Outcome) -> Outcome:
        """An outcome, unless the next slot must not be begun after it: see `step`."""
        harmless = isinstance(outcome, MET_BY_ALL) or self._world.size == 1
        if isinstance(outcome, Exception) and not harmless:
            raise outcome
        return outcome

    def _pack_fewer(self, count: int, failure: _Failure | None) -> None:
        """A trial is to blame only for what it does alone. `failure`: this rank's, if any."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        met = [found for found in self._world.gather(failure) if found is not None]
        worst = min(met, key=lambda found: found.fewer)
        self.together = worst.fewer
        self.notes.append(
            f"{worst.what} with {count} slots at once: {worst.fewer} from here on ({worst.quoted})"
        )

    def _leave_if_sharded(self, slots: Sequence[Slot], error: Exception) -> None:
        """End this life of the trials where the other ranks wait inside the model; see `step`."""
        config = slots[0].run.config
        if not BACKENDS[config.backend].is_sharded(config):
            return
        if not isinstance(error, torch.OutOfMemoryError | ModelError):
            raise error  # perhaps that another rank has gone: it says nothing of the slots
        failure = _Failure.of(error, len(slots))
        if self._limit_file is not None:
            known = [n for n in (self._kept(), failure.fewer) if n is not None]
            write_json(self._limit_file, {"together": min(known)})
        raise InfrastructureError(
            f"{failure.what} with {len(slots)} slots at once on rank {self._world.rank} with "
            f"backend={config.backend}: the trials start again with {failure.fewer} at once "
            f"({failure.quoted})"
        )

    def _kept(self) -> int | None:
        if self._limit_file is None or not self._limit_file.exists():
            return None
        return max(1, int(read_json(self._limit_file)["together"]))

    def _gradients(self, slots: Sequence[Slot]) -> list[Sums]:
        """Gradients of each slot's global batch, and what it summed up."""
        labelled = [slot.run.begin() for slot in slots]
        self._base.model.train()
        for slot in slots:
            for layer in slot.layers.values():
                layer.train()
        sums = [Sums() for _ in slots]
        feeds = [slot.run.micro_batches(own) for slot, own in zip(slots, sums, strict=True)]
        layers = slots[0].run.layers
        layers.change()
        try:
            for turn in zip_longest(*feeds):
                part = [(n, entry) for n, entry in enumerate(turn) if entry is not None]
                found = self._pass([(slots[n], entry, sums[n], labelled[n]) for n, entry in part])
                for (n, _), loss in zip(part, found.tolist(), strict=True):
                    sums[n].loss += loss
        finally:
            layers.restore()
        return sums

    def _pass(self, parts: Sequence[tuple[Slot, MicroBatch, Sums, int]]) -> torch.Tensor:
        """Forward and backward for a micro-batch of each slot; their losses, float32 `[slots]`."""
        arrays = [entry.arrays for _, entry, _, _ in parts]
        pad = self._base.processor.tokenizer.pad_token_id
        together = joined(arrays, self._base.family, pad_token_id=pad)
        rows_of_all = [row for _, entry, *_ in parts for row in entry.rows]
        batch, labels = parts[0][0].run.batches.on_device(together, rows_of_all)
        shares, begin = [], 0
        for (slot, *_), own in zip(parts, arrays, strict=True):
            rows = slice(begin, begin + num_rows(own))
            shares.append(Share(slot.layers, rows, length(own), slot.random))
            begin = rows.stop
        for slot, *_ in parts:
            slot.run.measure.forward_begins()
        with routed(self._base.model, shares):
            found = self._losses(batch, labels, parts[0][0].run.auditor.notes.append)
            for (slot, entry, sums, _), share in zip(parts, shares, strict=True):
                fed = entry.arrays["labels"].size
                part = (share.rows.stop - share.rows.start) / begin
                slot.run.measure.forward_ends(sums, fed, part)
            counts = [int((own["labels"][:, 1:] != IGNORED).sum()) for own in arrays]
            losses = torch.stack(
                [
                    own.sum() / labelled
                    for (*_, labelled), own in zip(parts, found.split(counts), strict=True)
                ]
            )
            losses.sum().backward()
        return losses.detach()


def _shares(outcomes: Sequence[Outcome], seconds: float) -> list[float]:
    """What each slot took of the time of a step."""
    if len(outcomes) == 1:
        return [seconds]
    fed = [entry.fed_tokens if isinstance(entry, StepMetrics) else 0 for entry in outcomes]
    return [seconds * own / max(1, sum(fed)) for own in fed]


def _finished(
    slots: Sequence[Slot],
    sums: Sequence[Sums],
    gradients: Gradients,
    began: float,
    checked: Callable[[Outcome], Outcome],
) -> list[Outcome]:
    """`Run.finish` of each slot, with one update for all whose gradients can be used.

    Each outcome is `checked` before the next slot's model is asked.
    """
    runs, norms = [slot.run for slot in slots], gradients.norms
    usable: list[bool | Exception] = []
    for slot, run, own, norm in zip(slots, runs, sums, norms, strict=True):
        judge = partial(run.judge, own, norm)
        usable.append(_asked(slot, judge, mounted=run.auditor.is_due))
    gradients.use([found is True for found in usable], [run.config.max_grad_norm for run in runs])
    outcomes: list[Outcome] = []
    for slot, run, own, norm, found in zip(slots, runs, sums, norms, usable, strict=True):
        if isinstance(found, Exception):
            outcomes.append(checked(found))
        else:
            conclude = partial(run.conclude, own, norm, began, updated=found)
            outcomes.append(checked(_asked(slot, conclude, mounted=run.auditor.awaits_update)))
    return outcomes


def _asked(slot: Slot, what: Callable[[], _Found], *, mounted: bool) -> _Found | Exception:
    """What a slot's run answers, or the error that ends it; `mounted` for what asks the model."""
    step = slot.run.steps_done + 1
    try:
        with slot.mounted() if mounted else nullcontext(), infeasible_without_memory(step):
            return what()
    except Exception as error:
        return error
