"""Tiny Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and the thinkers of Qwen2.5-Omni and Qwen3-Omni."""

from __future__ import annotations

from typing import Any

from raytune_vlm.models.tiny.parts import CHATML, ends, no_videos, text_config, tokenizer

_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


def _tokenizer() -> Any:
    return tokenizer("<|im_start|>", *_VISION, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _media_ids(tokens: Any) -> dict[str, int]:
    names = ("vision_start", "vision_end", "image", "video")
    numbers = tokens.convert_tokens_to_ids(list(_VISION))
    return {f"{name}_token_id": number for name, number in zip(names, numbers, strict=True)}


def _images(patch: int) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    side = 2 * patch
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        size={"shortest_edge": side * side * 4, "longest_edge": side * side * 16},
    )


def _mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4, **more}


def qwen2_vl() -> tuple[Any, Any]:
    """`qwen2_vl`."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokens = _tokenizer()
    config = Qwen2VLConfig(
        text_config=text_config(**ends(tokens), rope_parameters=_mrope([2, 3, 3])),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        **_media_ids(tokens),
    )
    processor = Qwen2VLProcessor(
        image_processor=_images(14),
        tokenizer=tokens,
        video_processor=no_videos(merge_size=2, temporal_patch_size=2),
        chat_template=_TEMPLATE,
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    """`qwen2_5_vl`."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    tokens = _tokenizer()
    config = Qwen2_5_VLConfig(
        text_config=text_config(**ends(tokens), rope_parameters=_mrope([2, 3, 3])),
        vision_config=_tower_2_5(),
        **_media_ids(tokens),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=_images(14),
        tokenizer=tokens,
        video_processor=no_videos(merge_size=2, temporal_patch_size=2),
        chat_template=_TEMPLATE,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _tower_2_5() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }


def qwen3_vl() -> tuple[Any, Any]:
    """`qwen3_vl`."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    tokens = _tokenizer()
    config = Qwen3VLConfig(
        text_config=text_config(
            **ends(tokens),
            head_dim=16,
            rope_parameters=_mrope([2, 3, 3], mrope_interleaved=True),
        ),
        vision_config=_tower_3(),
        **_media_ids(tokens),
    )
    processor = Qwen3VLProcessor(
        image_processor=_images(16),
        tokenizer=tokens,
        video_processor=no_videos(merge_size=2, temporal_patch_size=2),
        chat_template=_TEMPLATE,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _tower_3() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }


_OMNI = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_OMNI_TEMPLATE = CHATML.replace("IMAGE", "<|vision_bos|><|IMAGE|><|vision_eos|>")


def _omni_tokenizer() -> Any:
    return tokenizer(
        "<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=_OMNI,
    )


def _omni_parts(tokens: Any, patch: int) -> dict[str, Any]:
    from transformers import WhisperFeatureExtractor

    return {
        "image_processor": _images(patch),
        "tokenizer": tokens,
        "video_processor": no_videos(merge_size=2, temporal_patch_size=2),
        "feature_extractor": WhisperFeatureExtractor(feature_size=16),
        "chat_template": _OMNI_TEMPLATE,
    }


def _hearing(**more: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": 16,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "output_dim": 64,
        **more,
    }


def qwen2_5_omni_thinker() -> tuple[Any, Any]:
    """`qwen2_5_omni_thinker`."""
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )

    tokens = _omni_tokenizer()
    number = tokens.convert_tokens_to_ids
    config = Qwen2_5OmniThinkerConfig(
        text_config=text_config(**ends(tokens), rope_parameters=_mrope([2, 3, 3])),
        vision_config=_tower_2_5(),
        audio_config=_hearing(n_window=10),
        audio_token_index=number("<|AUDIO|>"),
        image_token_index=number("<|IMAGE|>"),
        video_token_index=number("<|VIDEO|>"),
        vision_start_token_id=number("<|vision_bos|>"),
        vision_end_token_id=number("<|vision_eos|>"),
        audio_start_token_id=number("<|audio_bos|>"),
        audio_end_token_id=number("<|audio_eos|>"),
    )
    processor = Qwen2_5OmniProcessor(**_omni_parts(tokens, 14))
    return Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def qwen3_omni_moe_thinker() -> tuple[Any, Any]:
    """`qwen3_omni_moe_thinker`."""
    from transformers import (
        Qwen3OmniMoeProcessor,
        Qwen3OmniMoeThinkerConfig,
        Qwen3OmniMoeThinkerForConditionalGeneration,
    )

    tokens = _omni_tokenizer()
    number = tokens.convert_tokens_to_ids
    config = Qwen3OmniMoeThinkerConfig(
        text_config=text_config(
            **ends(tokens),
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            rope_parameters=_mrope([2, 3, 3], mrope_interleaved=True),
        ),
        vision_config=_tower_3(),
        audio_config=_hearing(n_window=10, downsample_hidden_size=8),
        audio_token_id=number("<|AUDIO|>"),
        image_token_id=number("<|IMAGE|>"),
        video_token_id=number("<|VIDEO|>"),
        vision_start_token_id=number("<|vision_bos|>"),
        vision_end_token_id=number("<|vision_eos|>"),
        audio_start_token_id=number("<|audio_bos|>"),
        audio_end_token_id=number("<|audio_eos|>"),
    )
    processor = Qwen3OmniMoeProcessor(**_omni_parts(tokens, 16))
    return Qwen3OmniMoeThinkerForConditionalGeneration(config), processor
