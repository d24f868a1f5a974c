"""`deepspeed`: ZeRO stage 3 (Rajbhandari et al. 2020) on the frozen base, adapters as in `ddp`.

As with `fsdp2`, the base is partitioned before there is an adapter. The engine is the one that
DeepSpeed makes where it is given no optimizer: parameters are gathered module by module in forward
and backward, and nothing else is done to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.models.loading import Base
from raytune_vlm.train.backends.ddp import Ddp
from raytune_vlm.train.world import World

WHOLE_BELOW = 100_000
"""Parameters with fewer elements stay whole: norms and biases, not worth a message each."""


class DeepSpeed(Ddp):
    """See `Backend`."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        world: World,
        config: TrainConfig,
    ) -> None:
        super().__init__(model, optimizer, world, config)
        self._engine = model.get_base_model().raytune_vlm_engine

    @staticmethod
    def is_sharded(config: TrainConfig) -> bool:
        """See `Backend`."""
        return True

    @staticmethod
    def place(base: Base, world: World, config: TrainConfig) -> None:
        """See `Backend`."""
        deepspeed = _deepspeed(world)
        zero = {"stage": 3, "stage3_param_persistence_threshold": WHOLE_BELOW}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        # Before the engine is made: it would move the whole base to the device first.
        deepspeed.zero.Init(module=base.model, config_dict_or_path=settings)
        for buffer in base.model.buffers():
            buffer.data = buffer.data.to(world.device)
        engine, *_ = deepspeed.initialize(model=base.model, config=settings)
        object.__setattr__(base.model, "raytune_vlm_engine", engine)  # no submodule: it holds this

    @staticmethod
    @contextmanager
    def whole(base: Base) -> Iterator[None]:
        """See `Backend`."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(base.model.parameters())):
            yield

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Backend`."""
        super().backward(loss, last=last)
        # What the engine's own `backward` does: the next pass is expected to be as this one was.
        self._engine.optimizer.get_param_coordinator().reset_step()


def _deepspeed(world: World) -> Any:
    """The package, told the device before it looks for one itself, and to compile nothing."""
    if world.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    if world.device == "cpu":
        # Faster messages on one machine; it would be compiled with g++ at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
