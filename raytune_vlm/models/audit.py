"""The audit of a trial: what must hold at its first step and at its end, each with its number.

A check is a plain dict, so that it can stand in the trial's record and in the report:
`{"passed": bool, "value": float, ...}`, with `tolerance` where the value may not exceed one and
`message` where it failed; or `{"skipped": why}`. `raise_failed` turns the fatal ones into
`AuditFailed`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_vlm.errors import AuditFailed
from raytune_vlm.models.lora import detach

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Check = dict[str, Any]

REPORTED_ONLY = ("image_effect",)
"""Checks that do not fail a trial: there are data sets whose images say nothing of the answer."""

KEPT_LOGITS = 64
"""Positions, counted from the end, whose logits are compared: a whole batch of them is gigabytes
where the vocabulary has a quarter of a million tokens."""

MERGE_ROUNDINGS = {"float32": 1024, "float16": 64, "bfloat16": 64}
"""Units of rounding of the base's dtype, relative to the largest logit, by which a merged model may
differ. See `merge_tolerance`."""


def raise_failed(checks: Mapping[str, Check]) -> None:
    """Raise AuditFailed for the first fatal check that did not pass: its name, value, tolerance."""
    for name, check in checks.items():
        if check.get("passed", True) or name in REPORTED_ONLY:
            continue
        limit = f", tolerance {check['tolerance']:.3g}" if "tolerance" in check else ""
        raise AuditFailed(f"audit: {name}: {check['message']} (value {check['value']:.3g}{limit})")


def failure_notes(checks: Mapping[str, Check]) -> list[str]:
    """What people should read about checks that did not pass but do not fail the trial."""
    return [
        f"audit: {name} not passed: {check['message']}"
        for name, check in checks.items()
        if name in REPORTED_ONLY and not check.get("passed", True)
    ]


def check_trainable(counts: Mapping[str, int], scopes: tuple[str, ...]) -> Check:
    """Trainable parameters lie in the scopes of the recipe, in each of them and nowhere else."""
    check = {
        "passed": set(counts) == set(scopes) and all(counts.values()),
        "value": sum(counts.values()),
        "by_scope": dict(counts),
    }
    if not check["passed"]:
        check["message"] = (
            f"trainable are {'+'.join(counts) or 'no'} parameters, the recipe asks for "
            f"{'+'.join(scopes)}"
        )
    return check


def check_gradients(model: torch.nn.Module) -> Check:
    """Every trainable tensor has a finite gradient, and not all of them are zero.

    Of modules that are trained in full only some tensor needs one: a forward pass may leave parts
    out (a pooling head, the last block of a vision tower that is read before its end). The value is
    the number of tensors whose gradient is not zero.
    """
    import torch

    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    nonzero = sum(bool(gradient.any()) for gradient in gradients.values() if gradient is not None)
    idle = [name for name, gradient in gradients.items() if gradient is None]
    full = [name for name in gradients if ".modules_to_save." in name]
    message = None if nonzero else "no trainable tensor received a gradient"
    for name, gradient in gradients.items():
        if gradient is None and (name not in full or set(full) <= set(idle)):
            message = f"{name} is trainable but received no gradient"
        elif gradient is not None and not bool(torch.isfinite(gradient).all()):
            message = f"the gradient of {name} is not finite"
    check: Check = {"passed": message is None, "value": nonzero, "tensors": len(gradients)}
    if idle:
        check["without_gradient"] = len(idle)
    return check if message is None else {**check, "message": message}


def check_effects(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, Check]:
    """Adapter on differs from adapter off; image differs from a blank image.

    Run after the first optimizer step (before it LoRA's B is zero and has no effect). `batch` has
    normalised pixels and no labels; a value is the largest difference of a logit.
    """

    adapted = last_logits(model, batch)
    with model.disable_adapter():
        plain = last_logits(model, batch)
    checks = {
        "adapter_effect": _effect(
            adapted, plain, "switching the adapter off changes nothing after the first step"
        )
    }
    pixels = [name for name in batch if name.endswith("pixel_values")]
    if pixels:
        blank = {name: _blank(batch[name]) for name in pixels}
        checks["image_effect"] = _effect(
            adapted,
            last_logits(model, {**batch, **blank}),
            "a blank image in place of the picture changes nothing: the model does not look at it",
        )
    return checks


def _blank(pixels: torch.Tensor) -> torch.Tensor:
    """Grey images; not zero, and tiles of zeros stay: Idefics3 takes these for padding."""
    import torch

    grey = torch.full_like(pixels, 0.5)
    if pixels.dim() < 5:  # [images, ...], no tile is padding
        return grey
    is_padding = (pixels == 0).flatten(-3).all(-1)
    return grey.masked_fill(is_padding[..., None, None, None], 0.0)


def _effect(first: torch.Tensor, second: torch.Tensor, message: str) -> Check:
    value = _largest_difference(first, second)
    return {"passed": value > 0, "value": value, **({} if value > 0 else {"message": message})}


def check_merge(
    model: PeftModel, batch: dict[str, torch.Tensor], compute_dtype: str | None = None
) -> Check:
    """The model with the adapter merged into its weights answers as the one with the adapter on.

    Merging in place and back again is not exact in floating point, and the base is shared by all
    later trials. So each adapted layer is merged into a copy of its own weight, for the time of its
    own forward pass: one copy at a time, and the base's memory is never written to.
    """
    if not all(layer.get_base_layer().weight.is_floating_point() for layer in _layers(model)):
        return {"skipped": "the base is quantised: a merged model is another model"}
    if any(hasattr(layer.get_base_layer().weight, "ds_id") for layer in _layers(model)):
        return {"skipped": "ZeRO-3 gathers a layer's weights only when they are used"}
    adapted = last_logits(model, batch)
    with _merged_layer_by_layer(model):
        merged = last_logits(model, batch)
    value = _largest_difference(adapted, merged)
    tolerance = merge_tolerance(model, adapted, compute_dtype)
    check: Check = {"passed": value <= tolerance, "value": value, "tolerance": tolerance}
    if not check["passed"]:
        check["message"] = "merging the adapter into the base's weights changes the logits"
    return check


def merge_tolerance(
    model: torch.nn.Module, logits: torch.Tensor, compute_dtype: str | None = None
) -> float:
    """The largest difference of a logit that rounding explains.

    `compute_dtype` names the dtype that the base computes in; None: the one it is stored in.

    `W + BA` is rounded to the dtype of the base once, where `Wx` and `BAx` were rounded apart: an
    error of some units of rounding (`torch.finfo(dtype).eps`) in each layer, relative to what
    passes through it, that grows along the depth. `MERGE_ROUNDINGS` is above all the growth
    that was measured (`docs/log.md`); the largest logit gives the scale. In the half precisions
    this only catches a merge that is grossly wrong: there rounding alone can move a logit as far as
    a weak adapter does, which is why the value stands in the record beside `adapter_effect`.
    """
    import torch

    frozen = (p for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    name = compute_dtype or str(next(frozen).dtype).removeprefix("torch.")
    rounding = MERGE_ROUNDINGS[name] * torch.finfo(getattr(torch, name)).eps
    return rounding * max(1.0, float(logits.abs().max()))


def check_reload(
    base: torch.nn.Module,
    folder: Path,
    batch: dict[str, torch.Tensor],
    expected: torch.Tensor,
    compute_dtype: str | None = None,
) -> Check:
    """The adapter files of a checkpoint, on the bare base, answer as the adapter in memory did.

    Parameters
    ----------
    base
        The base model with no adapter on; left as it was.
    expected
        `last_logits` of the trained adapter on the same batch.

    Rounding is allowed for: the order of a sum may depend on where a tensor lies in memory, even
    on a CPU, and PiSSA and OLoRA are saved as one adapter of twice the rank.
    """
    from peft import PeftModel

    device = next(base.parameters()).device
    fresh = PeftModel.from_pretrained(base, str(folder), torch_device=str(device))
    try:
        value = _largest_difference(last_logits(fresh, batch), expected)
        tolerance = merge_tolerance(fresh, expected, compute_dtype)
    finally:
        detach(fresh)
    check: Check = {"passed": value <= tolerance, "value": value, "tolerance": tolerance}
    if not check["passed"]:
        check["message"] = f"the adapter loaded from {folder.name} answers differently"
    return check


def last_logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the last `KEPT_LOGITS` positions, float32 `[batch, positions, vocabulary]`.

    Those of padding are zero. The model is in evaluation mode for the time of the call.
    """
    import torch

    training = model.training
    model.eval()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        options["logits_to_keep"] = KEPT_LOGITS
    try:
        with torch.no_grad():
            logits = model(**batch, **options).logits[:, -KEPT_LOGITS:].float()
    finally:
        model.train(training)
    mask = batch.get("attention_mask")  # of packed rows none, or Gemma's by kind of layer
    if isinstance(mask, torch.Tensor) and mask.shape[1] >= logits.shape[1]:
        logits = logits.masked_fill(mask[:, -logits.shape[1] :, None] == 0, 0.0)
    return logits


def _largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@contextmanager
def _merged_layer_by_layer(model: torch.nn.Module) -> Iterator[None]:
    """Let every adapted layer compute with merged weights, one copy of a weight at a time."""
    import torch

    kept: dict[Any, torch.nn.Parameter] = {}

    def merge(layer: Any, *_: Any) -> None:
        inner = layer.get_base_layer()
        kept[layer] = inner.weight
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
        layer.merge()

    def restore(layer: Any, *_: Any) -> None:
        if layer in kept:
            layer.unmerge()
            layer.get_base_layer().weight = kept.pop(layer)

    layers = _layers(model)
    hooks = [layer.register_forward_pre_hook(merge) for layer in layers]
    hooks += [layer.register_forward_hook(restore, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in list(kept):
            restore(layer)


def _layers(model: torch.nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
