"""`FAMILIES`: everything the program knows about a VLM architecture, one entry a `model_type`.

A new family is one entry here and one builder in `models/tiny.py`; the contract tests in
`tests/test_models.py` and `tests/test_collate.py` pick it up from the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from raytune_vlm.errors import ModelError

MediaLayout = Literal["samples", "concatenate"]


@dataclass(frozen=True)
class Family:
    """What differs from one architecture to the next.

    Attributes
    ----------
    model_type
        As `config.json` names it.
    media
        Media tensor -> how a batch of samples is made of it: `samples` stacks along a new first
        dimension, padding the second (tiles) with zeros; `concatenate` joins along dimension 0
        (images, patches or tiles).
    media_tokens
        Names of the token-id attributes of the model's config that stand for media; a label never
        stands on one of them.
    channels
        Where the colour channel of `pixel_values` is: its axis counted from the end (`-3` for
        `[..., 3, height, width]`), or `patches` for Qwen's `[patches, 3 * t * p * p]`, cut on the
        device from flat images `[3 * height * width]`.
    scopes
        LoRA scope -> prefixes of module names. The longest prefix that fits a module decides.
    needs
        Packages that the processor imports beyond ours.
    no_linear
        Scopes without any linear layer, where LoRA cannot go.
    """

    model_type: str
    media: Mapping[str, MediaLayout]
    scopes: Mapping[str, tuple[str, ...]]
    media_tokens: tuple[str, ...] = ("image_token_id",)
    channels: Literal[-3, "patches"] = -3
    needs: tuple[str, ...] = ()
    no_linear: tuple[str, ...] = ()

    def check_scopes(self, scopes: set[str]) -> None:
        """Raise ModelError for a LoRA scope that holds no linear layer in this family."""
        for scope in sorted(scopes & set(self.no_linear)):
            others = " or ".join(name for name in self.scopes if name not in self.no_linear)
            raise ModelError(
                f"lora.scope: {scope!r} holds no linear layer in {self.model_type}; use {others}"
            )


_QWEN_MEDIA: dict[str, MediaLayout] = {
    "pixel_values": "concatenate",
    "image_grid_thw": "concatenate",
}
_QWEN_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_QWEN_SCOPES = {
    "text": ("model.language_model.",),
    "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "vision": ("model.visual.",),
}

FAMILIES: dict[str, Family] = {
    "idefics3": Family(
        model_type="idefics3",
        media={"pixel_values": "samples", "pixel_attention_mask": "samples"},
        scopes={
            "text": ("model.text_model.",),
            "projector": ("model.connector.",),
            "vision": ("model.vision_model.",),
        },
    ),
    "smolvlm": Family(
        model_type="smolvlm",
        media={"pixel_values": "samples", "pixel_attention_mask": "samples"},
        scopes={
            "text": ("model.text_model.",),
            "projector": ("model.connector.",),
            "vision": ("model.vision_model.",),
        },
        needs=("num2words",),
    ),
    "qwen2_vl": Family(
        model_type="qwen2_vl",
        media=_QWEN_MEDIA,
        media_tokens=_QWEN_TOKENS,
        channels="patches",
        scopes=_QWEN_SCOPES,
        needs=("torchvision",),
    ),
    "qwen2_5_vl": Family(
        model_type="qwen2_5_vl",
        media=_QWEN_MEDIA,
        media_tokens=_QWEN_TOKENS,
        channels="patches",
        scopes=_QWEN_SCOPES,
        needs=("torchvision",),
    ),
    "gemma3": Family(
        model_type="gemma3",
        media={"pixel_values": "concatenate"},
        media_tokens=("image_token_id", "boi_token_index", "eoi_token_index"),
        scopes={
            "text": ("model.language_model.",),
            "projector": ("model.multi_modal_projector.",),
            "vision": ("model.vision_tower.",),
        },
        # Gemma 3's projection is a bare Parameter.
        no_linear=("projector",),
    ),
}
