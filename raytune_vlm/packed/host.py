"""The host: one frozen base, and one step of several slots at a time.

`exact` takes the slots one after another, each as it would run alone: bit-equal on CPU. `fast` puts
their micro-batches into one, the base works on all rows at once and every row goes through its own
slot's adapter (`routing`): equal to rounding. Loss, clipping, update, learning rate and data cursor
are each slot's own either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Literal, TypeVar

import torch

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.collate.features import drops
from raytune_vlm.errors import first_line
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import unmixable
from raytune_vlm.packed.routing import Share, routed
from raytune_vlm.packed.slot import Slot
from raytune_vlm.packed.super_batch import joined, length, num_rows
from raytune_vlm.packed.update import Gradients
from raytune_vlm.prepare.feed import MicroBatch
from raytune_vlm.train.memory import infeasible_without_memory
from raytune_vlm.train.output_layer import TokenLosses
from raytune_vlm.train.run import Run
from raytune_vlm.train.step_metrics import StepMetrics, Sums

_Found = TypeVar("_Found")
Mode = Literal["exact", "fast"]
Outcome = StepMetrics | Exception
"""What a step gave: its metrics, or the error that ends this slot's trial and no other."""


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
    """

    def __init__(self, base: Base, mode: Mode) -> None:
        self._base, self._mode = base, mode
        self._together: int | None = None
        self._drops = any(map(drops, base.model.modules()))
        self._losses = TokenLosses(base.model)
        self.notes: list[str] = []
        """What is to be said of memory and errors; who reads it empties it."""

    def obstacle(self, run: Run) -> str | None:
        """Why a run steps by itself in mode `fast`; None if it is packed."""
        experiment = run.experiment
        if experiment.model.dtype == "float16":
            return "model.dtype=float16: every trial scales its loss itself"
        if experiment.train.pack_tokens is not None:
            return "train.pack_tokens: a row holds several samples"
        if experiment.train.distillation.is_on:
            return "train.distillation: its output layer is used in chunks of its own tokens"
        if self._drops:
            return f"{self._base.family.model_type} has dropout of its own, the same for all rows"
        return unmixable(experiment.lora)

    def step(self, slots: Sequence[Slot]) -> list[Outcome]:
        """One optimizer step of each slot, in their order."""
        outcomes: dict[int, Outcome] = {}
        waiting = list(range(len(slots)))
        while waiting:
            numbers = self._next([slots[number] for number in waiting])
            group = [waiting[number] for number in numbers]
            found = self._step([slots[number] for number in group])
            if found is not None:
                outcomes |= dict(zip(group, found, strict=True))
                waiting = [number for number in waiting if number not in outcomes]
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
        return alike[: self._together]

    def _step(self, slots: Sequence[Slot]) -> list[Outcome] | None:
        """One step of slots that fit together; None if it has to be tried again with fewer."""
        if len(slots) == 1:
            with slots[0].mounted() as run:
                return [step_alone(run)]
        began = time.monotonic()
        states = [slot.random.state for slot in slots]
        try:
            sums = self._gradients(slots)
            gradients = Gradients([slot.flat for slot in slots])
        except Exception as error:
            for slot, state in zip(slots, states, strict=True):
                slot.random.state = state
                slot.run.forget_gradients()
            self._pack_fewer(len(slots), error)
            return None
        return _finished(slots, sums, gradients, began)

    def _pack_fewer(self, count: int, error: Exception) -> None:
        """A trial is to blame only for what it does alone."""
        if isinstance(error, torch.OutOfMemoryError):
            self._together, what = (count + 1) // 2 if count > 2 else 1, "out of memory"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            self._together, what = 1, type(error).__name__
        self.notes.append(
            f"{what} with {count} slots at once: {self._together} from here on "
            f"({first_line(error)})"
        )

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


def _finished(
    slots: Sequence[Slot], sums: Sequence[Sums], gradients: Gradients, began: float
) -> list[Outcome]:
    """`Run.finish` of each slot, with one update for all whose gradients can be used."""
    runs, norms = [slot.run for slot in slots], gradients.norms
    usable: list[bool | Exception] = []
    for slot, run, own, norm in zip(slots, runs, sums, norms, strict=True):
        judge = partial(run.judge, own, norm)
        usable.append(_asked(slot, judge, mounted=run.auditor.is_due))
    gradients.use([found is True for found in usable], [run.config.max_grad_norm for run in runs])
    outcomes: list[Outcome] = []
    for slot, run, own, norm, found in zip(slots, runs, sums, norms, usable, strict=True):
        if isinstance(found, Exception):
            outcomes.append(found)
        else:
            conclude = partial(run.conclude, own, norm, began, updated=found)
            outcomes.append(_asked(slot, conclude, mounted=run.auditor.awaits_update))
    return outcomes


def _asked(slot: Slot, what: Callable[[], _Found], *, mounted: bool) -> _Found | Exception:
    """What a slot's run answers, or the error that ends it; `mounted` for what asks the model."""
    step = slot.run.steps_done + 1
    try:
        with slot.mounted() if mounted else nullcontext(), infeasible_without_memory(step):
            return what()
    except Exception as error:
        return error
