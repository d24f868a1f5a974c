"""Parameter groups of AdamW: one for each peak learning rate."""

from __future__ import annotations

from typing import Any

import torch

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.models.families import Family
from raytune_vlm.models.lora import trainable

_FAST = (".lora_B.", ".lora_magnitude_vector.")
"""What LoRA+ trains faster: the B matrices and, as in PEFT's `loraplus`, DoRA's magnitudes."""


def parameter_groups(
    model: torch.nn.Module, family: Family, experiment: ExperimentConfig
) -> list[dict[str, Any]]:
    """AdamW's groups; `peak` of each is what its schedule multiplies.

    The peak is the scope's learning rate, for B matrices times `lora.loraplus_ratio` (LoRA+, Hayou
    et al. 2024).
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for scope, name, parameter in trainable(model, family):
        peak = experiment.train.peak_of(scope)
        if any(part in name for part in _FAST):
            peak *= experiment.lora.loraplus_ratio
        groups.setdefault(peak, []).append(parameter)
    return [{"params": found, "lr": peak, "peak": peak} for peak, found in groups.items()]
