"""LoRA on chosen scopes of a VLM: which modules, attached and removed without a trace.

PEFT's `target_modules="all-linear"` reaches into the vision tower and the projector, and lists
such as `["q_proj", "v_proj"]` hit the vision tower in some families and not in others. Here a
scope means the same in every family, and a scope that matches nothing is an error.

    adapted = attach(base.model, base.family, experiment.lora, seed=0)
    ...
    base.model = detach(adapted)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import Family

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

ADAPTER = "default"
"""PEFT's name of the adapter in training."""

START = "start"
"""PEFT's name of the frozen adapter that `pissa` and `olora` take off the base's weights again."""

_PEFT_PREFIX = "base_model.model."
_COPY = f".modules_to_save.{ADAPTER}"


def scope_of(name: str, family: Family) -> str | None:
    """The scope that a module or parameter belongs to, or None (for example `lm_head`)."""
    name = name.removeprefix("module.").removeprefix(_PEFT_PREFIX).replace(_COPY, "", 1)
    best, length = None, -1
    for scope, prefixes in family.scopes.items():
        for prefix in prefixes:
            if name.startswith(prefix) and len(prefix) > length:
                best, length = scope, len(prefix)
    return best


def target_modules(
    model: torch.nn.Module, family: Family, scopes: tuple[str, ...]
) -> dict[str, list[str]]:
    """Scope -> full names of its linear layers, in the model's order.

    Raises
    ------
    ModelError
        If one of the scopes holds no linear layer.
    """
    import torch

    found: dict[str, list[str]] = {scope: [] for scope in scopes}
    head = output_layer(model)
    unread = _past_features(model, family)
    for name, module in model.named_modules():
        scope = scope_of(name, family)
        called = name.rpartition(".")[2] not in family.never_called
        if not isinstance(module, torch.nn.Linear) or scope not in found or not called:
            continue
        if module is not head and name not in unread:
            found[scope].append(name)
    for scope, names in found.items():
        if not names:
            raise ModelError(
                f"lora.scope: {scope!r} holds no linear layer in this {family.model_type}"
            )
    return found


def output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """What makes logits: the model's own, or that of the language model inside it.

    Nemotron, Kimi-VL and NVLM leave logits to a language model that is whole by itself.
    """
    for holder in (model, getattr(model, "language_model", None)):
        get = getattr(holder, "get_output_embeddings", None)
        layer: torch.nn.Module | None = get() if get is not None else None
        if layer is not None:
            return layer
    return None


def _past_features(model: torch.nn.Module, family: Family) -> set[str]:
    """Modules of the vision tower behind the layer whose output is used (LLaVA's last but one).

    A config says which by `vision_feature_layer` or, Phi-4's, `feature_layer`: the n-th entry of
    the hidden states is the output of the n-th layer, counted from 1.
    """
    vision = getattr(model.config, "vision_config", None)
    chosen = getattr(model.config, "vision_feature_layer", getattr(vision, "feature_layer", None))
    count = getattr(vision, "num_hidden_layers", None)
    if chosen is None or not isinstance(count, int):
        return set()
    entries = chosen if isinstance(chosen, list | tuple) else [chosen]
    used = max(entry if entry >= 0 else count + 1 + entry for entry in entries)
    return {
        name
        for name, _ in model.named_modules()
        if scope_of(name, family) == "vision"
        and (layer := re.search(r"\.layers\.(\d+)\.", name)) is not None
        and int(layer[1]) >= used
    }


def full_modules(model: torch.nn.Module, family: Family, scopes: tuple[str, ...]) -> list[str]:
    """Full names of the largest modules that hold parameters of one of the scopes and no others.

    Raises
    ------
    ModelError
        If a scope has no parameters, or one that lies beside another scope's in one module.
    """
    import torch

    containers = (torch.nn.ModuleList, torch.nn.ModuleDict)
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    seen: set[str] = set()

    def visit(prefix: str, module: torch.nn.Module) -> None:
        parameters = module.named_parameters(prefix, remove_duplicate=False)
        inside = {scope_of(name, family) for name, _ in parameters}
        if not inside & set(scopes):
            return
        # PEFT takes a name for the end of one: Donut's `encoder` holds an `encoder` itself.
        clear = not any(name != prefix and name.endswith(prefix) for name in names)
        if len(inside) == 1 and clear and not isinstance(module, containers):
            found.append(prefix)
            seen.update(str(scope) for scope in inside)
            return
        for name, _ in module.named_parameters(prefix, recurse=False):
            if scope_of(name, family) in scopes:
                raise ModelError(
                    f"lora.modules_to_save: {name} of {family.model_type} lies in a module with "
                    "parts of other scopes and cannot be trained in full"
                )
        for name, child in module.named_children():
            visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", model)
    for scope in scopes:
        if scope not in seen:
            raise ModelError(f"lora.modules_to_save: {family.model_type} has no {scope!r}")
    return found


def attach(model: torch.nn.Module, family: Family, config: LoraConfig, *, seed: int) -> PeftModel:
    """Wrap the base model with a freshly initialised adapter.

    The base's modules are replaced in place and its weights stay as they are; `detach` puts the
    modules back. Adapter weights, and copies of modules that are trained in full, are float32
    whatever the base's dtype, and depend on `seed` and the base only.

    Raises
    ------
    ModelError
        If a scope holds nothing to adapt, if the rank is too large for the init, or if PEFT adapts
        something else than asked.
    """
    import peft
    import torch

    targets = target_modules(model, family, config.scopes)
    copied = full_modules(model, family, config.full_scopes)
    from_weights = config.init in ("pissa", "olora")
    if from_weights:
        _check_ranks(model, targets, config)
    torch.manual_seed(seed)
    own = {name: model.get_submodule(name) for name in chain(*targets.values(), copied)}
    try:
        adapted = peft.get_peft_model(model, _peft_config(config, targets, copied))
    except BaseException:  # there is nothing to `detach` yet, but some modules are replaced
        for name, module in own.items():
            model.set_submodule(name, module)
        raise
    try:
        _check_targets(adapted, family, targets, copied, config)
        for layer in lora_layers(adapted).values() if from_weights else ():
            _start_from_weight(layer, config.init, adapted.peft_config[ADAPTER])
        for wrapper in _copies(adapted).values():
            _train_in_float32(wrapper.modules_to_save[ADAPTER])
    except BaseException:
        detach(adapted)
        raise
    return adapted


def detach(model: PeftModel) -> torch.nn.Module:
    """Take an adapter off; the base model, frozen and in evaluation mode, is what it was before."""
    for wrapper in _copies(model).values():
        wrapper.set_adapter([])  # else PEFT leaves the trained copy in the base
    base: torch.nn.Module = model.unload()
    base.requires_grad_(False)
    base.eval()
    return base


def _peft_config(config: LoraConfig, targets: dict[str, list[str]], copied: list[str]) -> Any:
    import peft

    first, *others = targets
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for scope in others:
        # PEFT takes patterns to be regular expressions for the end of a name: this one is exact.
        pattern = "^(?:" + "|".join(re.escape(name) for name in targets[scope]) + ")"
        if config.rank_of(scope) != config.rank_of(first):
            ranks[pattern] = config.rank_of(scope)
        if config.alpha_of(scope) != config.alpha_of(first):
            alphas[pattern] = config.alpha_of(scope)
    return peft.LoraConfig(
        r=config.rank_of(first),
        lora_alpha=config.alpha_of(first),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights=config.init if config.init in ("gaussian", "orthogonal") else True,
        target_modules=[name for names in targets.values() for name in names],
        modules_to_save=copied or None,
        bias="none",
    )


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """Full name in the base -> its LoRA layer."""
    from peft.tuners.lora import LoraLayer

    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def unmixable(config: LoraConfig) -> str | None:
    """Why rows of one batch cannot go through this adapter and through others; None if they can."""
    if config.dora:
        return "lora.dora=true: its norms are taken over a whole batch"
    if config.full_scopes:
        return f"lora.modules_to_save={config.modules_to_save} is one module for all rows"
    if tuple(config.scopes) != ("text",):
        return f"lora.scope={config.scope}: rows of the towers are images, not samples"
    return None


def wrapped(model: PeftModel) -> dict[str, tuple[Any, Any]]:
    """Full name in the base -> PEFT's module that stands there, and the base's own."""
    layers = {name: (layer, layer.base_layer) for name, layer in lora_layers(model).items()}
    copies = {name: (copy, copy.original_module) for name, copy in _copies(model).items()}
    return layers | copies


def _copies(model: PeftModel) -> dict[str, Any]:
    """Full name in the base -> PEFT's wrapper around it and its trained copy."""
    from peft.utils import ModulesToSaveWrapper

    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, ModulesToSaveWrapper)}


def _check_targets(
    adapted: PeftModel,
    family: Family,
    targets: dict[str, list[str]],
    copied: list[str],
    config: LoraConfig,
) -> None:
    asked: dict[str, tuple[int, float]] = {}
    for scope, names in targets.items():
        rank = config.rank_of(scope)
        scale = config.alpha_of(scope) / (math.sqrt(rank) if config.rslora else rank)
        asked |= dict.fromkeys(names, (rank, scale))
    found = {
        name: (layer.r[ADAPTER], layer.scaling[ADAPTER])
        for name, layer in lora_layers(adapted).items()
    }
    strays = sorted(name for name in asked.keys() | found if asked.get(name) != found.get(name))
    strays += sorted(set(copied) ^ _copies(adapted).keys())
    if strays:
        raise ModelError(
            f"lora.scope={config.scope}: PEFT adapted {family.model_type} otherwise than asked, "
            f"for example {', '.join(strays[:3])}"
        )


def _check_ranks(model: torch.nn.Module, targets: dict[str, list[str]], config: LoraConfig) -> None:
    for scope, names in targets.items():
        for name in names:
            most = min(model.get_submodule(name).weight.shape)
            if config.rank_of(scope) > most:
                raise ModelError(
                    f"lora.init={config.init}: rank {config.rank_of(scope)} is more than {name} "
                    f"has, which is {most}"
                )


def _start_from_weight(layer: Any, init: str, peft_config: Any) -> None:
    """Let a layer's adapter start as a part of its weight, and leave the weight as it is.

    PiSSA (Meng et al. 2024) and OLoRA (Buyukakyuz 2024) train W = (W - s B0 A0) + s B A from
    B, A = B0, A0. PEFT changes the weight; here a second, frozen adapter subtracts s B0 A0: the
    base stays bit-equal, nothing is rounded to its dtype, and both adapters together are one of
    twice the rank, which is what is saved.
    """
    from dataclasses import replace

    weight = layer.get_base_layer().weight
    kept = weight.data
    weight.data = kept.clone()  # PEFT's OLoRA writes into it
    if init == "pissa":
        layer.pissa_init(ADAPTER, "pissa_niter_16")
    else:
        layer.olora_init(ADAPTER)
    weight.data = kept
    plain = replace(peft_config, lora_dropout=0.0)
    layer.update_layer(START, layer.r[ADAPTER], layer.lora_alpha[ADAPTER], config=plain)
    layer.scaling[START] = -layer.scaling[ADAPTER]
    for matrices in (layer.lora_A, layer.lora_B):
        frozen = matrices[START]
        del frozen.weight
        # A buffer: PEFT switches the gradients of every active adapter's parameters on.
        frozen.register_buffer("weight", matrices[ADAPTER].weight.detach().clone())
    layer.set_adapter([ADAPTER, START])


def _train_in_float32(module: torch.nn.Module) -> None:
    """Make a copy float32 inside; what goes in is cast to that, what comes out is cast back."""
    import torch
    from torch.utils._pytree import tree_map

    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    if dtype == torch.float32:
        return

    def cast(values: Any, to: torch.dtype) -> Any:
        def one(value: Any) -> Any:
            tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(to) if tensor else value

        return tree_map(one, values)

    module.float()
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (cast(args, torch.float32), cast(kwargs, torch.float32)),
        with_kwargs=True,
    )
    module.register_forward_hook(lambda _, args, output: cast(output, dtype))


def trainable_by_scope(model: torch.nn.Module, family: Family) -> dict[str, int]:
    """Trainable parameters, counted by scope; raises ModelError if one lies outside all scopes."""
    counts: dict[str, int] = {}
    for scope, _, parameter in trainable(model, family):
        counts[scope] = counts.get(scope, 0) + parameter.numel()
    return counts


def trainable(
    model: torch.nn.Module, family: Family
) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(scope, name, parameter) of all that is trained.

    Raises
    ------
    ModelError
        If one lies outside all scopes.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scope = scope_of(name, family)
            if scope is None:
                raise ModelError(f"{name} is trainable but lies in no scope of {family.model_type}")
            yield scope, name, parameter
