"""An adapter as files that plain `PeftModel.from_pretrained(base, folder)` reads, and back.

Nearly all of it is PEFT's own; `pissa` and `olora` are what differs: there a frozen second adapter
takes the start off the base's weights (see `models.lora`), and W - s B0 A0 + s B A is saved as one
adapter of twice the rank, [A; A0] and [B, -B0].
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_vlm.errors import CheckpointError
from raytune_vlm.models.lora import ADAPTER, START

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into a folder."""
    own = model.peft_config[ADAPTER]
    model.peft_config[ADAPTER] = _config_as_saved(model)
    try:
        model.save_pretrained(str(folder), safe_serialization=True, state_dict=_joined(model))
    finally:
        model.peft_config[ADAPTER] = own
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(folder: Path, model: PeftModel) -> None:
    """Load the adapter's weights, in place.

    Raises
    ------
    CheckpointError
        If the adapter's tensors are not those of the model, or the file is no safetensors file.
    """
    from peft import set_peft_model_state_dict

    weights = read_tensors(folder / "adapter_model.safetensors")
    expected = {name: tuple(tensor.shape) for name, tensor in weights_as_saved(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        odd = sorted(set(expected.items()) ^ set(found.items()))[0]
        raise CheckpointError(f"{folder}: the adapter does not fit the model at {odd[0]} {odd[1]}")
    for name, frozen in _starts(model):
        key = name.replace(f".{START}.", ".")
        if ".lora_A." in name:
            trained, start = weights[key].chunk(2, dim=0)
        else:
            trained, start = weights[key].chunk(2, dim=1)
            start = -start
        weights[key] = trained.contiguous()
        frozen.copy_(start)
    set_peft_model_state_dict(model, weights)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; raises CheckpointError where there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        found: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no whole safetensors file: {error}") from None
    return found


def weights_as_saved(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of its file."""
    from peft import get_peft_model_state_dict

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=_joined(model))
    return found


def start_tensors(model: PeftModel) -> list[torch.Tensor]:
    """The frozen starts of `pissa` and `olora`, in the model's order; empty otherwise."""
    return [tensor for _, tensor in _starts(model)]


def _starts(model: PeftModel) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if f".{START}." in name]


def _joined(model: PeftModel) -> dict[str, torch.Tensor]:
    """The model's state with trained and frozen adapters as one; itself where nothing is frozen."""
    import torch

    state: dict[str, torch.Tensor] = model.state_dict()
    for name, frozen in _starts(model):
        key = name.replace(f".{START}.", f".{ADAPTER}.")
        if ".lora_A." in name:
            state[key] = torch.cat([state[key], frozen], dim=0)
        else:
            state[key] = torch.cat([state[key], -frozen], dim=1)
        del state[name]
    return state


def _config_as_saved(model: PeftModel) -> Any:
    """The adapter's PEFT config; where the start is frozen, with twice the rank and equal scale."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    if _starts(model):
        factor = math.sqrt(2) if config.use_rslora else 2
        config.r *= 2
        config.lora_alpha *= factor
        config.rank_pattern = {name: rank * 2 for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: a * factor for name, a in config.alpha_pattern.items()}
    return config
