"""Checks that an adapter trains, changes the answers, and that the image matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytune_vlm.errors import AuditFailed

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def check_gradients(model: torch.nn.Module) -> dict[str, Any]:
    """Every trainable tensor has a finite gradient, and not all of them are zero.

    Of modules that are trained in full only some tensor needs one: a forward pass may leave parts
    out (a pooling head, the last block of a vision tower that is read before its end).

    Raises
    ------
    AuditFailed
        Naming the first tensor that has none.
    """
    import torch

    total, nonzero, idle = 0, 0, []
    full_with_gradient = False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        total += 1
        full = ".modules_to_save." in name
        if parameter.grad is None and full:
            idle.append(name)
            continue
        if parameter.grad is None:
            raise AuditFailed(f"audit: {name} is trainable but received no gradient")
        full_with_gradient |= full
        if not bool(torch.isfinite(parameter.grad).all()):
            raise AuditFailed(f"audit: the gradient of {name} is not finite")
        nonzero += bool(parameter.grad.any())
    if nonzero == 0:
        raise AuditFailed("audit: no trainable tensor received a gradient")
    if idle and not full_with_gradient:
        raise AuditFailed(f"audit: {idle[0]} and all that is trained in full received no gradient")
    found = {"passed": True, "tensors": total, "nonzero": nonzero}
    return {**found, "without_gradient": len(idle)} if idle else found


def check_effects(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Adapter on differs from adapter off; image differs from a blank image.

    Run after the first optimizer step (before it LoRA's B is zero and has no effect). `batch` has
    normalised pixels and no labels; differences are the largest over all logits.

    Raises
    ------
    AuditFailed
        If the adapter has no effect at all. An image without effect is reported, not fatal:
        there are text-only samples.
    """
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        adapted = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        adapter_effect = float((adapted - base).abs().max())
        checks = {"adapter_effect": {"passed": adapter_effect > 0, "value": adapter_effect}}
        if "pixel_values" in batch:
            blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"]) + 0.5}
            image_effect = float((adapted - model(**blank).logits).abs().max())
            checks["image_effect"] = {"passed": image_effect > 0, "value": image_effect}
    model.train(training)
    if not checks["adapter_effect"]["passed"]:
        raise AuditFailed("audit: switching the adapter off changes nothing after the first step")
    return checks
