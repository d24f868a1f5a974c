"""The update of all slots of a pass at once: clipping and AdamW, each slot by its own recipe.

The weights of a slot lie end to end in one tensor for each group of its optimizer, and so do their
moments; what torch, PEFT and checkpoints know are views of it. So a handful of calls of torch is
the whole update, however many matrices and slots there are. torch's own multi-tensor AdamW takes
one learning rate and one number of steps for all, and on a GPU launches kernels for 30 to 110
matrices at a time (`MultiTensorApply.cuh`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, compress
from typing import Any

import torch
from torch.nn.utils import vector_to_parameters

_PLAIN = torch.optim.AdamW([torch.zeros(0)]).defaults
_FREE = {"lr", "weight_decay", "foreach"}
"""What may be set otherwise than in `_PLAIN`: by recipes, and how torch's own update loops."""


def _end_to_end(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """A copy of all; `parameters_to_vector` takes no transposed ones."""
    return torch.cat([part.flatten() for part in parts])


class _Group:
    """A parameter group of an optimizer, end to end.

    Parameters
    ----------
    options
        One of `optimizer.param_groups`; its `lr` and `weight_decay` are read in every update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> None:
        self.options = options
        self._state, self._parameters = optimizer.state, options["params"]
        for parameter in self._parameters:
            if not self._state[parameter]:
                self._state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        tensors = self._tensors()
        flats = [_end_to_end([part.detach() for part in parts]) for parts in tensors]
        self.weights, self.averages, self.squares, self.steps = flats
        """Of all parameters: weights, `exp_avg`, `exp_avg_sq`; `step`, on the CPU as in torch."""
        for flat, parts in zip(flats, tensors, strict=True):
            vector_to_parameters(flat, parts)  # makes them views of it
        self.step = tensors[-1][0]
        """Updates so far, the same for all: float32 `[]`."""
        self._places = self._current_places()

    def _tensors(self) -> list[list[torch.Tensor]]:
        states = [self._state[parameter] for parameter in self._parameters]
        kept = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")]
        return [self._parameters, *kept]

    def _current_places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in chain(*self._tensors())]

    @property
    def is_whole(self) -> bool:
        """Whether the optimizer's tensors are still the views; a checkpoint replaces them."""
        return self._current_places() == self._places

    def gradients(self) -> list[torch.Tensor]:
        """Of each parameter; a missing one is zero (see `Ddp`)."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]


class Flat:
    """The optimizer of a slot, end to end from its first update with others on.

    Parameters
    ----------
    optimizer
        A plain AdamW. Its state stays where it was, for checkpoints and for updates by itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[_Group] = []

    def groups(self) -> list[_Group]:
        """Its parameter groups as they are now."""
        if not (self._groups and all(group.is_whole for group in self._groups)):
            assert type(self._optimizer) is torch.optim.AdamW
            for options in self._optimizer.param_groups:
                odd = {key for key, value in _PLAIN.items() if options[key] != value}
                assert odd <= _FREE, odd
            self._groups = [
                _Group(self._optimizer, options) for options in self._optimizer.param_groups
            ]
        return self._groups


class Gradients:
    """A copy of the gradients of some slots, ready for one update."""

    def __init__(self, slots: Sequence[Flat]) -> None:
        self._groups = [flat.groups() for flat in slots]
        groups = [*chain(*self._groups)]
        together = _end_to_end([part for group in groups for part in group.gradients()])
        self._pieces = together.split([len(group.weights) for group in groups])
        # The one time that the host waits for the device.
        norms = iter(torch.stack(torch._foreach_norm(self._pieces)).tolist())
        self.norms = [math.hypot(*(next(norms) for _ in own)) for own in self._groups]
        """Of each slot's gradients, all its groups together."""

    def use(self, which: Sequence[bool], limits: Sequence[float]) -> None:
        """Update the chosen slots, their gradients' norms clipped to their limits; once only.

        The scale is that of `clip_grad_norm_`, the update torch's `_multi_tensor_adam` with
        decoupled weight decay (Loshchilov and Hutter 2019): the same formulas in the same order.
        """
        chosen = [use for use, own in zip(which, self._groups, strict=True) for _ in own]
        if not any(chosen):
            return
        groups = [*compress(chain(*self._groups), chosen)]
        gradients = [*compress(self._pieces, chosen)]
        scales = [
            min(limit / (norm + 1e-6), 1.0)
            for limit, norm, own in zip(limits, self.norms, self._groups, strict=True)
            for _ in own
        ]
        weights = [group.weights for group in groups]
        averages = [group.averages for group in groups]
        squares = [group.squares for group in groups]
        rates = [group.options["lr"] for group in groups]
        decays = [group.options["weight_decay"] for group in groups]
        beta, beta_squares = _PLAIN["betas"]

        torch._foreach_add_([group.steps for group in groups], 1)
        steps = torch.stack([group.step for group in groups]).tolist()
        torch._foreach_mul_(gradients, [*compress(scales, chosen)])
        torch._foreach_mul_(weights, [1 - lr * by for lr, by in zip(rates, decays, strict=True)])
        torch._foreach_lerp_(averages, gradients, 1 - beta)
        torch._foreach_mul_(squares, beta_squares)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta_squares)
        divisors = gradients  # Their memory is free now.
        torch._foreach_copy_(divisors, squares)
        torch._foreach_sqrt_(divisors)
        torch._foreach_div_(divisors, [math.sqrt(1 - beta_squares**step) for step in steps])
        torch._foreach_add_(divisors, _PLAIN["eps"])
        sizes = [-lr / (1 - beta**step) for lr, step in zip(rates, steps, strict=True)]
        torch._foreach_addcdiv_(weights, averages, divisors, sizes)
