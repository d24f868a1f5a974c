"""`FAMILIES`: everything the program knows about a VLM architecture, one entry a `model_type`.

A new family is one entry here and one builder in `models/tiny/`; the contract tests in
`tests/contracts/` pick it up from the tables. Families that need code of their own stand in
`models/remote_families.py`.
"""

from __future__ import annotations

from raytune_vlm.models.family import Family, MediaLayout, Prompt, scopes
from raytune_vlm.models.remote_families import REMOTE_FAMILIES

__all__ = ["FAMILIES", "Family", "MediaLayout", "Prompt"]

_LLAVA_SCOPES = scopes(
    "model.language_model.",
    "model.multi_modal_projector.",
    "model.vision_tower.",
)
_NEWLINE = ("model.image_newline",)
"""A bare parameter between tiles, which stays as it is."""
_IDEFICS_SCOPES = scopes("model.text_model.", "model.connector.", "model.vision_model.")
_QWEN_SCOPES = scopes(
    "model.language_model.",
    "model.visual.merger. model.visual.deepstack_merger_list.",
    "model.visual.",
)
_OMNI_SCOPES = scopes(
    "model.language_model.", "model.visual.merger. model.visual.merger_list.", "model.visual."
)
_GEMMA4_SCOPES = scopes("model.language_model.", "model.embed_vision.", "model.vision_tower.")

_PATCHES: dict[str, MediaLayout] = {"pixel_values": "concatenate", "image_grid_thw": "concatenate"}
_TILES: dict[str, MediaLayout] = {"pixel_values": "samples", "pixel_attention_mask": "samples"}
_SIZED: dict[str, MediaLayout] = {"pixel_values": "concatenate", "image_sizes": "concatenate"}
_GEMMA4_MEDIA: dict[str, MediaLayout] = {
    "pixel_values": "concatenate",
    "image_position_ids": "concatenate",
}
_PHI4 = "model.embed_tokens_extend.image_embed."
_GEMMA4_AUDIO = ("model.audio_tower.", "model.embed_audio.")


def _qwen(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        scopes=_QWEN_SCOPES,
        media=_PATCHES,
        channels="patches",
        multimodal_positions=True,
    )


def _omni(model_type: str, model_class: str) -> Family:
    return Family(
        model_type=model_type,
        scopes=_OMNI_SCOPES,
        media=_PATCHES,
        channels="patches",
        model_class=model_class,
        outside=("model.audio_tower.",),
        multimodal_positions=True,
    )


_QWEN2_5_OMNI = "Qwen2_5OmniThinkerForConditionalGeneration"
_QWEN3_OMNI = "Qwen3OmniMoeThinkerForConditionalGeneration"

_ENTRIES = (
    _qwen("qwen2_vl"),
    _qwen("qwen2_5_vl"),
    _qwen("qwen3_vl"),
    # Of Qwen's omni models the thinker is tuned: what reads images and writes text.
    _omni("qwen2_5_omni", _QWEN2_5_OMNI),
    _omni("qwen2_5_omni_thinker", _QWEN2_5_OMNI),
    _omni("qwen3_omni_moe", _QWEN3_OMNI),
    _omni("qwen3_omni_moe_thinker", _QWEN3_OMNI),
    Family(
        model_type="gemma3",
        scopes=scopes(
            "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."
        ),
        packing="masks",
        # Gemma 3's projection is a bare Parameter.
        no_linear=("projector",),
    ),
    Family(
        model_type="gemma4",
        scopes=_GEMMA4_SCOPES,
        media=_GEMMA4_MEDIA,
        channels="interleaved",
        outside=_GEMMA4_AUDIO,
    ),
    Family(
        model_type="gemma4_unified",
        # No vision tower: patches are projected into the language model.
        scopes=scopes(
            "model.language_model.",
            "model.embed_vision.multimodal_embedder.",
            "model.embed_vision.",
        ),
        media=_GEMMA4_MEDIA,
        channels="interleaved",
        needs=("torchvision",),
        outside=_GEMMA4_AUDIO,
    ),
    Family(
        model_type="gemma3n",
        scopes=_GEMMA4_SCOPES,
        needs=("timm", "torchvision"),
        # MobileNet-V5 is made of convolutions.
        no_linear=("vision",),
        outside=_GEMMA4_AUDIO,
        never_called=("correction_coefs",),
    ),
    Family(model_type="paligemma", scopes=_LLAVA_SCOPES, prompt="prefix", packing=None),
    Family(model_type="llava", scopes=_LLAVA_SCOPES),
    Family(model_type="pixtral", scopes=_LLAVA_SCOPES, media=_SIZED, padded_images=True),
    Family(model_type="mistral3", scopes=_LLAVA_SCOPES, media=_SIZED, padded_images=True),
    Family(model_type="llava_next", scopes=_LLAVA_SCOPES, media=_SIZED, outside=_NEWLINE),
    Family(
        model_type="llava_onevision",
        scopes=_LLAVA_SCOPES,
        media={**_SIZED, "batch_num_images": "concatenate"},
        outside=_NEWLINE,
    ),
    Family(
        model_type="internvl",
        scopes=_LLAVA_SCOPES,
    ),
    Family(model_type="idefics3", scopes=_IDEFICS_SCOPES, media=_TILES),
    Family(
        model_type="smolvlm",
        scopes=_IDEFICS_SCOPES,
        media=_TILES,
        needs=("num2words",),
    ),
    Family(
        model_type="mllama",
        # Its cross-attention is left out only where no row has an image.
        text_beside_images=False,
        scopes=scopes(
            "model.language_model.", "model.multi_modal_projector", "model.vision_model."
        ),
        media={
            "pixel_values": "samples",
            "aspect_ratio_ids": "samples",
            "aspect_ratio_mask": "samples",
            "cross_attention_mask": "tokens",
        },
        packing=None,
    ),
    Family(
        model_type="kimi_k25",
        scopes=scopes("model.language_model.", "model.mm_projector.", "model.vision_tower."),
        media=_PATCHES,
        needs=("torchvision",),
    ),
    Family(
        model_type="phi4_multimodal",
        scopes=scopes(
            "model.embed_tokens. model.layers. model.norm.",
            f"{_PHI4}img_projection_ {_PHI4}global_img_ {_PHI4}sub_img_",
            f"{_PHI4}img_processor.embeddings. {_PHI4}img_processor.encoder. "
            f"{_PHI4}img_processor.post_layernorm.",
        ),
        media={**_SIZED, "image_attention_mask": "concatenate"},
        pixels="image_pixel_values",
        channels="crops",
        model_class="AutoModelForMultimodalLM",
        needs=("torchvision",),
        # Features are taken ahead of the tower's pooling head.
        outside=("model.embed_tokens_extend.audio_embed.", f"{_PHI4}img_processor.head."),
    ),
    Family(
        model_type="nemotron_h_omni",
        scopes=scopes(
            "language_model.model.",
            "multi_modal_projector.",
            "vision_model.embeddings.cls_ vision_model.embeddings.position_ "
            "vision_model.embeddings.patch_ vision_model.encoder.",
        ),
        media={"pixel_values": "concatenate", "image_grid_hw": "concatenate"},
        channels="planar",
        # The state of its Mamba layers goes on from sample to sample.
        packing=None,
        needs=("torchvision",),
        outside=("audio_tower.", "embed_audio.", "vision_model.embeddings.video_"),
    ),
    Family(
        model_type="florence2",
        scopes=_LLAVA_SCOPES,
        prompt="encoder-decoder",
        max_images=1,
        packing=None,
    ),
    Family(
        model_type="vision-encoder-decoder",
        scopes=scopes("decoder.model.", "enc_to_dec_proj", "encoder."),
        prompt="image-encoder",
        max_images=1,
        packing=None,
        # Donut's encoder and decoder are of one width.
        no_linear=("projector",),
        # Donut's decoder counts positions from the first token, padding or not.
        left_padding=False,
    ),
)

FAMILIES: dict[str, Family] = {entry.model_type: entry for entry in (*_ENTRIES, *REMOTE_FAMILIES)}
