"""`fsdp2`: the frozen base is cut up by `fully_shard`, adapters are as in `ddp`.

`fully_shard` is called before there is an adapter, so it never learns of one: the base's parameters
become DTensors that are gathered block by block in forward and backward, the adapter's are plain
tensors. The weights that a linear layer of PEFT computes with are whole then, because it lies
inside a block.

With `train.fsdp2.shard_size` below the number of workers each group of so many holds a whole base.
Nothing passes between the groups, as the base has no gradients to be summed, so each is sharded by
itself: what HSDP does, without its second dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.models.families import Family
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import scope_of
from raytune_vlm.train.backends.ddp import Ddp
from raytune_vlm.train.world import World


class Fsdp2(Ddp):
    """See `Backend`."""

    def collect(self) -> None:
        """See `Backend`. Cuts up again what a forward pass, as of the audit, has left whole.

        torch does so where a state is read, which rank 0 alone does for a checkpoint: it would then
        gather by itself what the others still have.
        """
        for module in _cut_up(self._model):
            module.reshard()

    def close(self) -> None:
        """See `Backend`. The base is cut up again, as the trial found it."""
        self.collect()
        super().close()

    @staticmethod
    def is_sharded(config: TrainConfig) -> bool:
        """See `Backend`."""
        return True

    @staticmethod
    def place(base: Base, world: World, config: TrainConfig) -> None:
        """Shard every block of language model and vision tower, then what is left of the model.

        The projector stays whole: it is small, and `lora.modules_to_save` trains copies of it.
        """
        model, family = base.model, base.family
        mesh = _mesh(world, config.fsdp2.shard_size or world.size)
        dtype = getattr(torch, config.fsdp2.compute_dtype or "", None)
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        kept = {p for name, p in model.named_parameters() if scope_of(name, family) == "projector"}
        for parameter in kept if dtype is not None else ():
            parameter.data = parameter.data.to(dtype)
        for block in blocks(model, family):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=kept)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=kept)
        model.to(world.device)
        # PEFT calls `forward` past the hooks of the module, `generate` encodes images before it.
        for method in ("forward", "generate"):
            register_fsdp_forward_method(model, method)
        # Whoever calls the model itself (`generate` for every token, packed slots) would gather
        # what is left of it twice, and free it although the backward pass needs it.
        state: Any = model._get_fsdp_state()  # type: ignore[operator]
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()

    @staticmethod
    @contextmanager
    def whole(base: Base) -> Iterator[None]:
        """See `Backend`."""
        modules = _cut_up(base.model)
        for module in modules:
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()


def _cut_up(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _mesh(world: World, shard_size: int) -> DeviceMesh:
    """This worker's group of `shard_size` neighbours."""
    device = world.device.partition(":")[0]
    shape = (world.size // shard_size, shard_size)
    # PEFT takes a dimension of any other name for tensor parallelism, and makes LoRA's B smaller.
    return init_device_mesh(device, shape, mesh_dim_names=("copies", "fsdp"))["fsdp"]


def blocks(model: torch.nn.Module, family: Family) -> list[torch.nn.Module]:
    """The layers of language model and vision tower: what stands in their outermost lists."""
    found: list[torch.nn.Module] = []

    def visit(prefix: str, module: torch.nn.Module, *, listed: bool) -> None:
        is_list = isinstance(module, torch.nn.ModuleList)
        if listed and not is_list:
            if scope_of(f"{prefix}.", family) in ("text", "vision"):
                found.append(module)
            return
        for name, child in module.named_children():
            visit(f"{prefix}.{name}" if prefix else name, child, listed=is_list)

    visit("", model, listed=False)
    return found
