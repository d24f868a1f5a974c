"""QLoRA (Dettmers et al. 2023): the language model's linear layers in 4 bits, by bitsandbytes.

The vision tower, the projector, embeddings and the head stay in `model.dtype`, as usual with PEFT
and transformers: they are a small part of the weights, and suffer most from rounding.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import Family
from raytune_vlm.models.lora import scope_of

if TYPE_CHECKING:
    import torch


def check_quantization(config: ModelConfig) -> None:
    """Raise ModelError if a package that `model.quantization` needs is not installed."""
    if config.quantization == "none":
        return
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model.quantization={config.quantization} needs {' and '.join(missing)}: "
            "pip install 'raytune-vlm[qlora]'"
        )


def quantized_modules(model: torch.nn.Module, family: Family) -> list[str]:
    """Full names of the linear layers that are held in 4 bits: those of the language model."""
    return [name for name, scope in _linear(model, family) if scope == "text"]


def kept_modules(model: torch.nn.Module, family: Family) -> str:
    """All other linear layers, as one expression: transformers tries each entry on each module."""
    return "|".join(re.escape(name) for name, scope in _linear(model, family) if scope != "text")


def quantization_options(
    config: ModelConfig, model: torch.nn.Module, family: Family, device: str
) -> dict[str, Any]:
    """What `from_pretrained` has to be told; `model` may be on the meta device.

    Raises
    ------
    ModelError
        If the device is no GPU.
    """
    if device == "cpu":
        # bitsandbytes 0.50 trains on CPU, but repacks the weights in evaluation mode, and fails
        # where a layer's width is no multiple of 64.
        raise ModelError(f"model.quantization={config.quantization} needs a GPU, and there is none")
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=[kept_modules(model, family)],
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _linear(model: torch.nn.Module, family: Family) -> list[tuple[str, str | None]]:
    import torch

    modules = model.named_modules()
    return [(n, scope_of(n, family)) for n, m in modules if isinstance(m, torch.nn.Linear)]
