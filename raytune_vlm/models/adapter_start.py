"""An adapter that starts from the trained one of another recipe, with another rank or scale.

What counts is the product s B A that is added to a weight, s being alpha / rank (or alpha / sqrt of
the rank): it stays the same, or as near to it as the rank allows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.errors import CheckpointError
from raytune_vlm.models.adapter_file import load_adapter, read_tensors, weights_as_saved
from raytune_vlm.models.families import Family
from raytune_vlm.models.lora import scope_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def resized(
    a: torch.Tensor, b: torch.Tensor, fresh: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of another rank whose product is `scale` times b @ a, or nearest to it.

    Up, B gets columns of zeros and A the rows of a fresh adapter: the product is exactly the same,
    and the new columns have gradients (beside rows of zeros they would have none, for ever). Down,
    the product is cut to its largest singular values, the best approximation in Frobenius norm
    (Eckart and Young 1936), each factor with their square roots.

    Parameters
    ----------
    a
        [rank, inputs].
    b
        [outputs, rank].
    fresh
        [new rank, inputs]: A of a new adapter.

    Returns
    -------
    tuple of Tensor
        [new rank, inputs] and [outputs, new rank].
    """
    import torch

    rank, new = a.shape[0], fresh.shape[0]
    if new >= rank:
        columns = b.new_zeros(b.shape[0], new - rank)
        return torch.cat([a, fresh[rank:].to(a)], dim=0), torch.cat([b * scale, columns], dim=1)
    # B = Q R and A^T = P S: the SVD of the small R S^T is that of B A.
    left, inner_left = torch.linalg.qr(b.double())
    right, inner_right = torch.linalg.qr(a.double().T)
    u, singular, vh = torch.linalg.svd(inner_left @ inner_right.T * scale)
    root = singular[:new].sqrt()
    found_b = left @ (u[:, :new] * root)
    found_a = (root[:, None] * vh[:new]) @ right.T
    return found_a.to(a.dtype).contiguous(), found_b.to(b.dtype).contiguous()


def start_from(
    folder: Path, model: PeftModel, family: Family, before: LoraConfig, now: LoraConfig
) -> list[str]:
    """Load an adapter that was trained with `before` into one made with `now`, in place.

    Returns
    -------
    list of str
        What was changed, for people: empty where the tensors are the same.

    Raises
    ------
    CheckpointError
        If the tensors are not those of the model but for their rank.
    """
    from peft import set_peft_model_state_dict

    if before == now:
        load_adapter(folder, model)
        return []
    found, ours = read_tensors(folder / "adapter_model.safetensors"), weights_as_saved(model)
    if found.keys() != ours.keys():
        odd = sorted(found.keys() ^ ours.keys())[0]
        raise CheckpointError(f"{folder}: the adapter does not fit the model at {odd}")
    kept: dict[str, list[float]] = {}
    for name in [name for name in found if name.endswith(".lora_A.weight")]:
        other = name.replace(".lora_A.", ".lora_B.")
        scope = scope_of(name, family) or ""
        a, b = found[name], found[other]
        factor = _scale(before, scope) / _scale(now, scope)
        found[name], found[other] = resized(a, b, ours[name], factor)
        if before.rank_of(scope) > now.rank_of(scope):
            whole = _squared_norm(a, b) * factor**2
            sums = kept.setdefault(scope, [0.0, 0.0])
            sums[0] += _squared_norm(found[name], found[other])
            sums[1] += whole
    odd_shapes = [name for name in ours if ours[name].shape != found[name].shape]
    if odd_shapes:
        raise CheckpointError(f"{folder}: the adapter does not fit the model at {odd_shapes[0]}")
    set_peft_model_state_dict(model, found)
    return _told(before, now, kept)


def _scale(config: LoraConfig, scope: str) -> float:
    rank = config.rank_of(scope)
    return config.alpha_of(scope) / (math.sqrt(rank) if config.rslora else rank)


def _squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of b @ a, which is the trace of (b^T b)(a a^T)."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def _told(before: LoraConfig, now: LoraConfig, kept: dict[str, list[float]]) -> list[str]:
    told = []
    for scope in now.scopes:
        old, new = before.rank_of(scope), now.rank_of(scope)
        if new > old:
            told.append(f"rank of {scope} {old} -> {new} by zero-padding, the product is the same")
        elif new < old:
            part, whole = kept[scope]
            share = part / whole if whole else 1.0
            told.append(
                f"rank of {scope} {old} -> {new} by truncated SVD, which keeps {share:.2%} of the "
                "product's squared norm"
            )
    return told
