"""Rows of a super-batch, each through its own slot's adapter, in one pass over the frozen base.

The adapters stay PEFT's own layers (`models.lora`), so that what is initialised, saved and scored is
what an isolated run has. They are not in the model while it is shared: a hook on each adapted linear
layer adds what the slots' layers would have added, to the rows that are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
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
    """
    names = dict.fromkeys(name for share in shares for name in share.layers)
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(partial(_add, name, shares))
            stack.callback(handle.remove)
        yield


def _add(
    name: str,
    shares: Sequence[Share],
    module: torch.nn.Module,
    args: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """The output of a linear layer `[rows, ..., out]` with the adapters' parts added.

    Raises
    ------
    ModelError
        If the layer is not given the rows of the batch: which slot's they are cannot be told.
    """
    (inputs,) = args
    if inputs.shape[0] != shares[-1].rows.stop or inputs.dim() < 3:
        raise ModelError(
            f"{name} is given {tuple(inputs.shape)} for a batch of {shares[-1].rows.stop} rows: "
            "its adapters cannot be packed"
        )
    longest = max(share.length for share in shares)
    here = [share for share in shares if name in share.layers]
    layers = [share.layers[name] for share in here]
    given = [_given(layer, inputs, share, longest) for layer, share in zip(layers, here, strict=True)]
    if len(here) == len(shares) > 1 and len({len(part) for part in given}) == 1:
        plain = not any(_drops(layer) for layer in layers)
        together = inputs.to(given[0].dtype) if plain else torch.cat(given)
        return output + _stacked(layers, together).to(output.dtype)
    pieces, done = [], 0
    for layer, share, part in zip(layers, here, given, strict=True):
        low = layer.lora_B[ADAPTER](layer.lora_A[ADAPTER](part)) * layer.scaling[ADAPTER]
        pieces += [output[done : share.rows.start], output[share.rows] + low.to(output.dtype)]
        done = share.rows.stop
    return torch.cat([*pieces, output[done:]])


def _drops(layer: Any) -> bool:
    dropout = layer.lora_dropout[ADAPTER]
    return not isinstance(dropout, torch.nn.Identity) and bool(dropout.training)


def _given(layer: Any, inputs: torch.Tensor, share: Share, longest: int) -> torch.Tensor:
    """What goes into a slot's A, `[its rows, ...]`: cast as PEFT does, dropped out as if alone.

    Alone, the rows would be padded to their own length only: the padding beyond draws nothing.
    """
    given = inputs[share.rows].to(layer.lora_A[ADAPTER].weight.dtype)
    if not _drops(layer):
        return given
    excess = longest - share.length if given.shape[1] == longest else 0
    with share.random:
        dropped = layer.lora_dropout[ADAPTER](given[:, : given.shape[1] - excess].contiguous())
    return pad(dropped, (0, 0) * (given.dim() - 2) + (0, excess))


def _stacked(layers: Sequence[Any], inputs: torch.Tensor) -> torch.Tensor:
    """What equally many rows of each layer add, as two batched products.

    Ranks are padded with zeros to the largest: what is padded is zero in the forward pass and gets
    no gradient, which ends in `pad`.

    Parameters
    ----------
    inputs
        `[slots * rows, ..., in]`.
    """
    most = max(layer.r[ADAPTER] for layer in layers)
    down = [layer.lora_A[ADAPTER].weight for layer in layers]
    up = [layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER] for layer in layers]
    downs = torch.stack([pad(weight, (0, 0, 0, most - len(weight))) for weight in down])
    ups = torch.stack([pad(weight, (0, most - weight.shape[1])) for weight in up])
    flat = inputs.reshape(len(layers), -1, inputs.shape[-1])
    low = torch.bmm(flat, downs.transpose(1, 2))
    return torch.bmm(low, ups.transpose(1, 2)).view(*inputs.shape[:-1], -1)
