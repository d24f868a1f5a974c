"""The host: one frozen base, and one step of several slots at a time.

`exact` takes the slots one after another, each as it would run alone: bit-equal on CPU. `fast` puts
their micro-batches into one, the base works on all rows at once and every row goes through its own
slot's adapter (`routing`): equal to rounding. Loss, clipping, update, learning rate and data cursor
are each slot's own either way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import torch

from raytune_vlm.errors import RaytuneVlmError
from raytune_vlm.models.loading import Base
from raytune_vlm.packed.routing import Share, routed
from raytune_vlm.packed.slot import Slot
from raytune_vlm.packed.super_batch import joined, length, num_rows
from raytune_vlm.prepare.feed import MicroBatch
from raytune_vlm.train.losses import summed_cross_entropy
from raytune_vlm.train.step_metrics import StepMetrics, Sums

Mode = Literal["exact", "fast"]
Outcome = StepMetrics | RaytuneVlmError
"""What a step gave: its metrics, or the error that ends this slot's trial and no other."""


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
        self.notes: list[str] = []
        """What is to be said of memory; who reads it empties it."""

    def step(self, slots: Sequence[Slot]) -> list[Outcome]:
        """One optimizer step of each slot, in their order."""
        if self._mode == "exact" or len(slots) == 1:
            return [self._alone(slot) for slot in slots]
        outcomes: list[Outcome] = []
        while len(outcomes) < len(slots):
            group = slots[len(outcomes) :][: self._together]
            if len(group) == 1:
                outcomes.append(self._alone(group[0]))
                continue
            states = [slot.random.state for slot in group]
            try:
                outcomes += self._packed(group)
            except torch.OutOfMemoryError as error:
                for slot, state in zip(group, states, strict=True):
                    slot.random.state = state
                    slot.run.forget_gradients()
                self._together = (len(group) + 1) // 2 if len(group) > 2 else 1
                self.notes.append(
                    f"out of memory with {len(group)} slots at once: {self._together} from here on "
                    f"({str(error).splitlines()[0]})"
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return outcomes

    @staticmethod
    def _alone(slot: Slot) -> Outcome:
        with slot.mounted() as run:
            try:
                return run.step()
            except RaytuneVlmError as error:
                return error

    def _packed(self, slots: Sequence[Slot]) -> list[Outcome]:
        began = time.monotonic()
        labelled = [slot.run.begin() for slot in slots]
        self._base.model.train()
        for slot in slots:
            for layer in slot.layers.values():
                layer.train()
        sums = [Sums() for _ in slots]
        feeds = [slot.run.micro_batches(own) for slot, own in zip(slots, sums, strict=True)]
        for turn in zip_longest(*feeds):
            part = [(n, entry) for n, entry in enumerate(turn) if entry is not None]
            found = self._pass([(slots[n], entry, sums[n], labelled[n]) for n, entry in part])
            for (n, _), loss in zip(part, found.tolist(), strict=True):
                sums[n].loss += loss
        outcomes: list[Outcome] = []
        for slot, own in zip(slots, sums, strict=True):
            with slot.mounted() as run:
                try:
                    outcomes.append(run.finish(own, began))
                except RaytuneVlmError as error:
                    outcomes.append(error)
        return outcomes

    def _pass(self, parts: Sequence[tuple[Slot, MicroBatch, Sums, int]]) -> torch.Tensor:
        """Forward and backward for a micro-batch of each slot; their losses, float32 `[slots]`."""
        arrays = [entry.arrays for _, entry, _, _ in parts]
        pad = self._base.processor.tokenizer.pad_token_id
        together = joined(arrays, self._base.family, pad_token_id=pad)
        batch, labels = parts[0][0].run.batches.on_device(together)
        shares, begin = [], 0
        for (slot, *_), own in zip(parts, arrays, strict=True):
            rows = slice(begin, begin + num_rows(own))
            shares.append(Share(slot.layers, rows, length(own), slot.random))
            begin = rows.stop
        for slot, *_ in parts:
            slot.run.measure.forward_begins()
        with routed(self._base.model, shares):
            logits = self._base.model(**batch).logits
            for (slot, entry, sums, _), share in zip(parts, shares, strict=True):
                fed = entry.arrays["labels"].size
                part = (share.rows.stop - share.rows.start) / begin
                slot.run.measure.forward_ends(sums, fed, part)
            losses = torch.stack(
                [
                    summed_cross_entropy(logits[share.rows], labels[share.rows]) / labelled
                    for (*_, labelled), share in zip(parts, shares, strict=True)
                ]
            )
            losses.sum().backward()
        return losses.detach()
