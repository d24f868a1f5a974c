"""What is done to a model's layers for the time of a run: recomputed activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import Family
from raytune_vlm.models.lora import scope_of


class RecomputedLayers:
    """The layers that `train.activation_checkpointing` names, changed for the time of a run.

    Raises
    ------
    ModelError
        If the family has no layers that this can be done to.
    """

    def __init__(self, model: torch.nn.Module, family: Family, config: TrainConfig) -> None:
        self._layers = [
            layer
            for scope, wanted in config.activation_checkpointing.model_dump().items()
            if wanted
            for layer in _layers(model, family, scope)
        ]
        self._undo: list[Callable[[], None]] = []

    def change(self) -> None:
        """Let them compute their activations again in the backward pass."""
        self._undo += [_recompute(layer) for layer in self._layers]

    def restore(self) -> None:
        """Leave them as they were."""
        while self._undo:
            self._undo.pop()()


def _layers(model: torch.nn.Module, family: Family, scope: str) -> list[Any]:
    """The layers of a scope that transformers can recompute, or what holds such a switch."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    able = [
        module
        for name, module in model.named_modules()
        if hasattr(module, "gradient_checkpointing") and scope_of(f"{name}.", family) == scope
    ]
    # Of a family that has them, models around the layers have the switch only to warn of caches.
    layers = [module for module in able if isinstance(module, GradientCheckpointingLayer)] or able
    if not layers:
        raise ModelError(
            f"train.activation_checkpointing: {family.model_type} has no layers "
            f"of scope {scope!r} that transformers can recompute"
        )
    return layers


def _recompute(layer: Any) -> Callable[[], None]:
    before = {
        name: vars(layer)[name]
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func")
        if name in vars(layer)
    }
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def undo() -> None:
        del layer.gradient_checkpointing, layer._gradient_checkpointing_func
        vars(layer).update(before)

    return undo
