"""LoRA on chosen scopes of a VLM: which modules, attached and removed without a trace.

PEFT's `target_modules="all-linear"` reaches into the vision tower and the projector, and lists
such as `["q_proj", "v_proj"]` hit the vision tower in some families and not in others. Here a
scope means the same in every family, and a scope that matches nothing is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import Family

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

_PEFT_PREFIX = "base_model.model."


def scope_of(name: str, family: Family) -> str | None:
    """The scope that a module or parameter belongs to, or None (for example `lm_head`)."""
    name = name.removeprefix("module.").removeprefix(_PEFT_PREFIX)
    best, length = None, -1
    for scope, prefixes in family.scopes.items():
        for prefix in prefixes:
            if name.startswith(prefix) and len(prefix) > length:
                best, length = scope, len(prefix)
    return best


def target_modules(model: torch.nn.Module, family: Family, scopes: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers in the scopes, in the model's order.

    Raises
    ------
    ModelError
        If one of the scopes holds no linear layer.
    """
    import torch

    found: dict[str, list[str]] = {scope: [] for scope in scopes}
    for name, module in model.named_modules():
        scope = scope_of(name, family)
        called = name.rpartition(".")[2] not in family.never_called
        if isinstance(module, torch.nn.Linear) and scope in found and called:
            found[scope].append(name)
    for scope, names in found.items():
        if not names:
            raise ModelError(
                f"lora.scope: {scope!r} holds no linear layer in this {family.model_type}"
            )
    return [name for names in found.values() for name in names]


def attach(model: torch.nn.Module, family: Family, config: LoraConfig, *, seed: int) -> PeftModel:
    """Wrap the base model with a freshly initialised adapter.

    The base's modules are replaced in place; `PeftModel.unload()` puts them back. Adapter weights
    are float32 whatever the base's dtype, and depend on `seed` only.
    """
    import peft
    import torch

    names = target_modules(model, family, config.scopes)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.scale_alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
            target_modules=names,
            bias="none",
        ),
    )
    _check_targets(adapted, family, names, config.scopes)
    return adapted


def _check_targets(adapted: Any, family: Family, names: list[str], scopes: tuple[str, ...]) -> None:
    adapted_names = {
        name.removeprefix(_PEFT_PREFIX).split(".lora_A.")[0]
        for name, _ in adapted.named_parameters()
        if ".lora_A." in name
    }
    if adapted_names != set(names):
        strays = sorted(adapted_names ^ set(names))[:3]
        raise ModelError(
            f"lora.scope={'+'.join(scopes)}: PEFT adapted other modules of {family.model_type} "
            f"than asked, for example {', '.join(strays)}"
        )


def trainable_by_scope(model: torch.nn.Module, family: Family) -> dict[str, int]:
    """Trainable parameters, counted by scope; raises ModelError if one lies outside all scopes."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scope = scope_of(name, family)
        if scope is None:
            raise ModelError(f"{name} is trainable but lies in no scope of {family.model_type}")
        counts[scope] = counts.get(scope, 0) + parameter.numel()
    return counts
