"""`ddp`: every worker holds the whole model; gradients are summed in one message."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.models.loading import Base
from raytune_vlm.train.world import World


class Ddp:
    """See `Backend`. With one worker nothing is communicated: the reference for all others.

    Not `DistributedDataParallel`: a rank whose samples have no images has no gradient in the vision
    tower, and its buckets would then wait for one or meet another collective.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        config: TrainConfig,
    ) -> None:
        self.optimizer, self._model = optimizer, model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        half = config.fsdp2.compute_dtype == "float16" or any(
            p.dtype == torch.float16 for p in model.parameters()
        )
        # Small gradients of activations would be zero in float16 (Micikevicius et al. 2018).
        self._scaler = torch.amp.GradScaler(world.device.partition(":")[0], enabled=half)
        self._world, self._config = world, config

    @staticmethod
    def is_sharded(config: TrainConfig) -> bool:
        """See `Backend`."""
        return False

    @staticmethod
    def place(base: Base, world: World, config: TrainConfig) -> None:
        """Every worker has loaded all of it."""

    @staticmethod
    def whole(base: Base) -> AbstractContextManager[None]:
        """It always is."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Backend`."""
        self._scaler.scale(loss).backward()

    def add_up(self) -> None:
        """See `Backend`."""
        add_up(self._parameters, self._world)

    def clip(self) -> float:
        """See `Backend`."""
        self._scaler.unscale_(self.optimizer)
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))

    def step(self) -> None:
        """See `Backend`."""
        self._fill_in()
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def skip(self) -> bool:
        """See `Backend`. At a scale of 1 there is nothing left to blame on it."""
        if not self._scaler.is_enabled():
            return False
        scaled = self._scaler.get_scale() > 1
        self._scaler.update()
        return scaled

    def scaler_state(self) -> dict[str, float]:
        """See `Backend`."""
        return dict(self._scaler.state_dict())

    def restore_scaler(self, state: dict[str, float]) -> None:
        """See `Backend`. A run goes on from a checkpoint without one with a fresh scaler."""
        if state:
            self._scaler.load_state_dict(state)

    def zero_grad(self) -> None:
        """See `Backend`."""
        self.optimizer.zero_grad(set_to_none=True)

    def reveal(self) -> None:
        """They are whole."""

    def collect(self) -> None:
        """It is whole."""

    def close(self) -> None:
        """See `Backend`."""
        self.zero_grad()

    def _fill_in(self) -> None:
        """Let a missing gradient be zero, which it is.

        AdamW would leave out what has none, such as a vision tower in a step of text alone; where
        models are cut up a blank image gives a gradient of zero, and moments decay.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def add_up(parameters: Sequence[torch.Tensor], world: World) -> None:
    """Let every rank have the sum of the ranks' gradients, in one message.

    What has a gradient on no rank keeps none, as on a single worker.
    """
    if world.size == 1:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters
    ]
    message = torch.cat([present.to(world.device), *parts])
    torch.distributed.all_reduce(message)
    present, *parts = message.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, part, count in zip(parameters, parts, present.tolist(), strict=True):
        if count:
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
