"""What keeps the samples of a packed row apart, on the device.

Position ids that start again with every sample are how transformers knows a packed row
(`transformers/masking_utils.py`, `find_packed_sequence_indices`: block-diagonal masks for sdpa and
eager, sequence boundaries for flash attention), as long as there is neither a mask nor a cache.
"""

from __future__ import annotations

from typing import Any

import torch

from raytune_vlm.collate.packed import SEGMENTS
from raytune_vlm.models.families import Family


def with_positions(model: Any, batch: dict[str, Any], family: Family) -> dict[str, Any]:
    """A packed batch as the forward takes it (without a cache: `use_cache=False`).

    Returns
    -------
    dict
        Instead of segments and mask `position_ids` int64 `[batch, length]`; for multimodal rotary
        positions `[4, batch, length]`, the first of which are the plain ones. For Gemma the
        masks of its two kinds of layers too, where images attend both ways.
    """
    segments = batch[SEGMENTS]
    rest = {name: t for name, t in batch.items() if name not in (SEGMENTS, "attention_mask")}
    changes = torch.ones_like(segments, dtype=torch.bool)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    plain = places - torch.where(changes, places, 0).cummax(dim=1).values
    if _has_image_blocks(model, family):
        rest["attention_mask"] = _block_masks(model, batch, plain)
    if not family.multimodal_positions:
        return {**rest, "position_ids": plain}
    rotary = plain.expand(3, -1, -1).clone()
    if "image_grid_thw" in batch:
        _place_images(model, batch, rotary)
    return {**rest, "position_ids": torch.cat([plain[None], rotary])}


def _place_images(model: Any, batch: dict[str, torch.Tensor], rotary: torch.Tensor) -> None:
    """Fill in the model's own positions, sample by sample."""
    segments = batch[SEGMENTS]
    taken = [
        torch.nonzero(row == number)[:, 0] + place * segments.shape[1]
        for place, row in enumerate(segments)
        for number in range(1, int(row.max()) + 1)
    ]
    lengths = torch.tensor([len(entry) for entry in taken], device=segments.device)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=segments.device) < lengths[:, None]
    flat = torch.cat(taken)

    def by_sample(name: str) -> torch.Tensor:
        out = torch.zeros(mask.shape, dtype=batch[name].dtype, device=segments.device)
        out[mask] = batch[name].flatten()[flat]
        return out

    names = [name for name in ("input_ids", "mm_token_type_ids") if name in batch]
    owner = getattr(model, "base_model", model)
    owner = next(part for part in owner.modules() if hasattr(part, "get_rope_index"))
    found, _ = owner.get_rope_index(
        **{name: by_sample(name) for name in names},
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=mask.long(),
    )
    rotary.flatten(1)[:, flat] = found[:, mask].to(rotary.dtype)


def _block_masks(
    model: Any, batch: dict[str, torch.Tensor], plain: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Additive masks `[batch, 1, length, length]` by kind of layer.

    Images attend to themselves both ways, everything else to what came before it in its sample.

    Made here because `create_masks_for_vision_model` (transformers 5.23,
    models/gemma3/modeling_gemma3.py) looks image blocks up at the restarted positions where it
    builds the mask of the sliding layers, so that packed samples get each other's blocks.
    """
    segments = batch[SEGMENTS]
    kinds = batch["token_type_ids" if "token_type_ids" in batch else "mm_token_type_ids"]
    starts = torch.nn.functional.pad(kinds.diff(dim=1).abs(), (1, 0)).cumsum(dim=1)
    blocks = torch.where(kinds == 1, starts, -1)
    same_block = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    distance = plain[:, :, None] - plain[:, None, :]
    allowed = (distance >= 0) | same_block
    allowed &= segments[:, :, None] == segments[:, None, :]
    config = model.config.get_text_config()
    dtype = next(model.parameters()).dtype

    def additive(mask: torch.Tensor) -> torch.Tensor:
        blank = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return blank.masked_fill(~mask, torch.finfo(dtype).min)[:, None]

    near = distance < config.sliding_window
    return {"full_attention": additive(allowed), "sliding_attention": additive(allowed & near)}


def _has_image_blocks(model: Any, family: Family) -> bool:
    """Whether the tokens of an image attend to each other both ways (Gemma 3, large Gemma 4)."""
    if family.packing == "masks":
        return True
    config = model.config.get_text_config()
    return getattr(config, "use_bidirectional_attention", None) == "vision"
