"""Tiny LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision and InternVL."""

from __future__ import annotations

from typing import Any

from raytune_vlm.models.tiny.parts import (
    CHATML,
    VICUNA,
    ends,
    no_videos,
    text_config,
    tokenizer,
    tower,
)

_SIDE, _PATCH = 28, 14


def _clip() -> dict[str, Any]:
    return tower(model_type="clip_vision_model", image_size=_SIDE, patch_size=_PATCH)


def _square() -> dict[str, Any]:
    return {"height": _SIDE, "width": _SIDE}


def llava() -> tuple[Any, Any]:
    """`llava` (1.5)."""
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokens = tokenizer("<image>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlavaConfig(
        text_config=text_config(**ends(tokens, bos=True), model_type="llama"),
        vision_config=_clip(),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=_square()),
        tokenizer=tokens,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    """`llava_next` (1.6)."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    tokens = tokenizer("<image>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    pinpoints = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
    config = LlavaNextConfig(
        text_config=text_config(**ends(tokens, bos=True), model_type="llama"),
        vision_config=_clip(),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": _SIDE}, crop_size=_square(), image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokens,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    """`llava_onevision`."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
    )

    tokens = tokenizer(
        "<|im_start|>", "<image>", "<video>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    pinpoints = [[_SIDE, _SIDE], [_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
    config = LlavaOnevisionConfig(
        text_config=text_config(**ends(tokens), model_type="qwen2"),
        vision_config=tower(
            model_type="siglip_vision_model",
            image_size=_SIDE,
            patch_size=_PATCH,
            vision_use_head=False,
        ),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size=_square(), image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokens,
        video_processor=no_videos(),
        num_image_tokens=(_SIDE // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    """`internvl`."""
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
    )

    tokens = tokenizer(
        "<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = InternVLConfig(
        text_config=text_config(**ends(tokens), model_type="qwen2"),
        vision_config=tower(image_size=[_SIDE, _SIDE], patch_size=[7, 7]),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size=_square(), crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokens,
        video_processor=no_videos(),
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    return InternVLForConditionalGeneration(config), processor
