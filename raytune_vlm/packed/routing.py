"""Rows of a super-batch, each through its own slot's adapter, in one pass over the frozen base.

The adapters stay PEFT's own layers (`models.lora`), so that what is initialised, saved and scored
is what an isolated run has. They are not in the model while it is shared: a hook on each adapted
linear layer adds what the slots' layers would have added, to the rows that are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

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
    with ExitStack() as stack:
        for name in names:
            hook = _Adding(name, shares)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


class _Adding:
    """The forward hook of one linear layer."""

    def __init__(self, name: str, shares: Sequence[Share]) -> None:
        self._name = name
        self._rows, self._longest = shares[-1].rows.stop, max(share.length for share in shares)
        self._shares = [share for share in shares if name in share.layers]
        self._covers = len(self._shares) == len(shares) > 1
        self._before: list[dict[str, torch.Tensor] | None] = [None] * len(self._shares)
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
        check_rows(self._name, inputs, self._rows)
        layers = [share.layers[self._name] for share in self._shares]
        given = [self._given(number, layer, inputs) for number, layer in enumerate(layers)]
        if self._covers and len({len(part) for part in given}) == 1:
            if not any(_drops(layer) for layer in layers):
                together = inputs.to(given[0].dtype)
                return output + _stacked(layers, together).to(output.dtype)
            if all(len(layer.active_adapters) == 1 for layer in layers):
                return output + _stacked(layers, torch.cat(given)).to(output.dtype)
        pieces, done = [], 0
        for layer, share, part in zip(layers, self._shares, given, strict=True):
            added = output[share.rows]
            for name in layer.active_adapters:
                # What takes the start of `pissa` and `olora` off again has no dropout.
                into = part if name == ADAPTER else inputs[share.rows].to(part.dtype)
                low = layer.lora_B[name](layer.lora_A[name](into)) * layer.scaling[name]
                added = added + low.to(output.dtype)
            pieces += [output[done : share.rows.start], added]
            done = share.rows.stop
        return torch.cat([*pieces, output[done:]])

    def _given(self, number: int, layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        """What goes into a share's A, `[its rows, ...]`: cast as PEFT does, dropped out apart.

        Alone, the rows would be padded to their own length only: the padding beyond draws nothing.
        """
        share, before = self._shares[number], self._before[number]
        given = inputs[share.rows].to(layer.lora_A[ADAPTER].weight.dtype)
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
        return pad(dropped, (0, 0) * (given.dim() - 2) + (0, excess))


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


def _stacked(layers: Sequence[Any], inputs: torch.Tensor) -> torch.Tensor:
    """What equally many rows of each layer add, as two batched products.

    Ranks are padded with zeros to the largest: what is padded is zero in the forward pass and gets
    no gradient, which ends in `pad`.

    Parameters
    ----------
    inputs
        `[slots * rows, ..., in]`.
    """
    down, up = zip(*map(matrices, layers), strict=True)
    most = max(map(len, down))
    downs = torch.stack([pad(weight, (0, 0, 0, most - len(weight))) for weight in down])
    ups = torch.stack([pad(weight, (0, most - weight.shape[1])) for weight in up])
    flat = inputs.reshape(len(layers), -1, inputs.shape[-1])
    low = torch.bmm(flat, downs.transpose(1, 2))
    return torch.bmm(low, ups.transpose(1, 2)).view(*inputs.shape[:-1], -1)


def matrices(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[rank, in]` and scaled B `[out, rank]` of all that is active in a layer."""
    names = layer.active_adapters
    down = torch.cat([layer.lora_A[name].weight for name in names])
    up = [layer.lora_B[name].weight * layer.scaling[name] for name in names]
    return down, torch.cat(up, dim=1)
