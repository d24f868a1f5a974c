"""`Backend`: how the workers of an executor share a model, and how gradients become one update.

Every backend leaves the adapter whole on every rank, and all but `deepspeed` its gradients and
moments. An adapter is megabytes where its base is
gigabytes, so there is nothing to gain from cutting it up, and what stands on disk, what is merged
and what is scored is the same whatever the backend. What is cut up is the frozen base, once for all
trials of an executor, before the first adapter is put on it: `fully_shard` and ZeRO-3 then know
nothing of adapters, and taking one off is what it is on a single worker.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.models.loading import Base
from raytune_vlm.train.world import World


class Backend(Protocol):
    """One trial's gradients and optimizer; `place` and `whole` are about the base.

    Parameters
    ----------
    model
        The base with its adapter on.
    optimizer
        AdamW over all that is trained.
    """

    optimizer: torch.optim.Optimizer
    """What its groups say is what the next step does."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        config: TrainConfig,
    ) -> None: ...

    @staticmethod
    def is_sharded(config: TrainConfig) -> bool:
        """Whether the base is cut up: ranks then wait for each other in every forward pass."""

    @staticmethod
    def place(base: Base, world: World, config: TrainConfig) -> None:
        """Spread a freshly loaded base over the workers, in place and for good."""

    @staticmethod
    def whole(base: Base) -> AbstractContextManager[None]:
        """The base's weights are whole on every rank inside."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a part of the global batch's loss; `last`: of this step."""

    def add_up(self) -> None:
        """Let every rank have the sum of the ranks' gradients, or its share of that."""

    def reveal(self) -> None:
        """Let the gradient of every tensor be the whole sum: for the audit."""

    def clip(self) -> float:
        """Scale the gradients down to `train.max_grad_norm`; their global norm before that.

        The true one: what a gradient scaler has put on is taken off first. Called once a step,
        after `add_up`, so that every rank finds the same.
        """

    def step(self) -> None:
        """One update of all that is trained; what has no gradient has one of zero."""

    def skip(self) -> bool:
        """No update, as the gradients are not finite; whether only the loss scale was too large.

        It is then smaller in the next step.
        """

    def scaler_state(self) -> dict[str, float]:
        """The gradient scaler's state; empty where there is none."""

    def restore_scaler(self, state: dict[str, float]) -> None:
        """Go on with a state of `scaler_state`."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def collect(self) -> None:
        """Let `optimizer.state` be whole: for a checkpoint. Every rank calls it."""

    def close(self) -> None:
        """The end of the trial; no rank waits for another."""
