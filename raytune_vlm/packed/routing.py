"""Rows of a super-batch, each through its own slot's adapter, in one pass over the frozen base.

The adapters stay PEFT's own layers (`models.lora`), so that what is initialised, saved and scored
is what an isolated run has. They are not in the model while it is shared: a hook on each adapted
linear layer adds what the slots' layers would have added, to the rows that are theirs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import embedding, pad

from raytune_vlm.errors import ModelError
from raytune_vlm.models.lora import ADAPTER
from raytune_vlm.packed.random import RandomState


@dataclass(frozen=True)
class Share:
    """A slot's part of a super-batch."""

    layers: dict[str, Any]
    """Full name in the base -> the slot's LoRA layer (PEFT's)."""
    rows: slice
    length: int
    """Tokens of these rows, padding of their own included; the super-batch may be longer."""
    random: RandomState
    """Where the slot's dropout draws from."""


@contextmanager
def routed(model: torch.nn.Module, shares: Sequence[Share]) -> Iterator[None]:
    """Inside, every row that `model` is given goes through the adapter of its share.

    `model` is the bare base; the shares' rows follow each other from row 0 on and cover the batch.
    For one forward pass and its backward pass, which may repeat layers (activation checkpointing).
    """
    names = dict.fromkeys(name for share in shares for name in share.layers)
    layouts = _Layouts()
    with ExitStack() as stack:
        for name in names:
            hook = _Adding(name, shares, layouts)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


class _Adding:
    """The forward hook of one linear layer."""

    def __init__(self, name: str, shares: Sequence[Share], layouts: _Layouts) -> None:
        self._name, self._layouts = name, layouts
        self._shares, self._longest = shares, max(share.length for share in shares)
        self._sizes = [share.rows.stop - share.rows.start for share in shares]
        self._layers = {
            number: share.layers[name]
            for number, share in enumerate(shares)
            if name in share.layers
        }
        """PEFT's layer of each share that has one here."""
        self._before: list[dict[str, torch.Tensor] | None] = [None] * len(shares)
        """The random state that each share's dropout began with, once it has."""

    def __call__(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """The output `[rows, ..., out]` with what the shares' adapters add.

        Raises
        ------
        ModelError
            As `check_rows`.
        """
        (inputs,) = args
        check_rows(self._name, inputs, sum(self._sizes))
        layers = [*self._layers.values()]
        are_alike = len(layers) == len(self._shares) > 1 == len(set(self._sizes))
        if are_alike and not any(map(_drops, layers)):
            together = inputs.to(layers[0].lora_A[ADAPTER].weight.dtype)
            return output + _stacked(layers, together, self._layouts).to(output.dtype)
        parts = inputs.split(self._sizes)  # slices would each have a gradient of all rows
        given = [
            self._given(number, layer, parts[number]) for number, layer in self._layers.items()
        ]
        if are_alike and all(len(layer.active_adapters) == 1 for layer in layers):
            together = torch.cat(given)
            return output + _stacked(layers, together, self._layouts).to(output.dtype)
        pieces = [*output.split(self._sizes)]
        for (number, layer), into in zip(self._layers.items(), given, strict=True):
            for name in layer.active_adapters:
                # What takes the start of `pissa` and `olora` off again has no dropout.
                own = into if name == ADAPTER else parts[number].to(into.dtype)
                low = layer.lora_B[name](layer.lora_A[name](own)) * layer.scaling[name]
                pieces[number] = pieces[number] + low.to(output.dtype)
        return torch.cat(pieces)

    def _given(self, number: int, layer: Any, part: torch.Tensor) -> torch.Tensor:
        """What goes into a share's A, `[its rows, ...]`: cast as PEFT does, dropped out apart.

        Alone, the rows would be padded to their own length only: the padding beyond draws nothing.
        """
        share, before = self._shares[number], self._before[number]
        given = part.to(layer.lora_A[ADAPTER].weight.dtype)
        if not _drops(layer):
            return given
        excess = self._longest - share.length if given.shape[1] == self._longest else 0
        own = given[:, : given.shape[1] - excess].contiguous()
        if before is None:
            self._before[number] = share.random.state
            with share.random.drawing():
                dropped = layer.lora_dropout[ADAPTER](own)
        else:
            with share.random.repeating(before):
                dropped = layer.lora_dropout[ADAPTER](own)
        return pad(dropped, (0, 0) * (given.dim() - 2) + (0, excess)) if excess else dropped


def check_rows(name: str, inputs: torch.Tensor, rows: int) -> None:
    """Make sure that a layer is given the rows of the batch.

    Raises
    ------
    ModelError
        If it is not: whose they are cannot be told.
    """
    if inputs.shape[0] != rows or inputs.dim() < 3:
        raise ModelError(
            f"{name} is given {tuple(inputs.shape)} for a batch of {rows} rows: its adapters "
            "cannot be packed"
        )


def _drops(layer: Any) -> bool:
    dropout = layer.lora_dropout[ADAPTER]
    return not isinstance(dropout, torch.nn.Identity) and bool(dropout.training)


class _Layouts:
    """How matrices of several slots lie in one tensor, made once a pass: a copy to the device."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def of(
        self, kinds: tuple[tuple[tuple[int, float], ...], ...], like: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """For each slot's ranks and scales: its rows among all slots', and the scale of each.

        Returns
        -------
        rows, scales
            int64 `[slots, most ranks]`, None if every slot has one matrix and all are alike;
            `[slots, 1, most ranks]` of the type and on the device of `like`. A slot of fewer ranks
            repeats a row of its own, with scale 0: what is not a number stays with its slot.
        """
        key = (kinds, like.device, like.dtype)
        if key not in self._made:
            counts = [sum(rank for rank, _ in slot) for slot in kinds]
            most, ends = max(counts), accumulate(counts)
            rows = [
                [min(end - count + place, end - 1) for place in range(most)]
                for count, end in zip(counts, ends, strict=True)
            ]
            scales = [[scale for rank, scale in slot for _ in range(rank)] for slot in kinds]
            padded = [[*own, *[0.0] * (most - len(own))] for own in scales]
            are_alike = len(set(counts)) == 1 and all(len(slot) == 1 for slot in kinds)
            self._made[key] = (
                None if are_alike else torch.tensor(rows, device=like.device),
                like.new_tensor(padded)[:, None],
            )
        return self._made[key]


def _stacked(layers: Sequence[Any], inputs: torch.Tensor, layouts: _Layouts) -> torch.Tensor:
    """What equally many rows of each layer add, as two batched products.

    The calls of torch do not grow with the layers, but for gradients of B under unlike ranks.

    Parameters
    ----------
    inputs
        `[slots * rows, ..., in]`, of the type of the adapters.
    """
    active = [[*layer.active_adapters] for layer in layers]
    parts = [(layer, name) for layer, names in zip(layers, active, strict=True) for name in names]
    downs = torch.cat([layer.lora_A[name].weight for layer, name in parts])
    ups = [layer.lora_B[name].weight for layer, name in parts]
    kinds = tuple(
        tuple((len(layer.lora_A[name].weight), layer.scaling[name]) for name in names)
        for layer, names in zip(layers, active, strict=True)
    )
    rows, scales = layouts.of(kinds, inputs)
    if rows is None:
        down = downs.view(len(layers), -1, inputs.shape[-1])
        up = torch.cat(ups).view(len(layers), -1, scales.shape[-1]).transpose(1, 2)
    else:
        down = embedding(rows, downs)
        up = embedding(rows, torch.cat([weight.t() for weight in ups]))
    flat = inputs.reshape(len(layers), -1, inputs.shape[-1])
    low = torch.bmm(flat, down.transpose(1, 2)) * scales
    return torch.bmm(low, up).view(*inputs.shape[:-1], -1)
