"""Tiny Gemma 3, Gemma 3n, Gemma 4, Gemma 4 unified and PaliGemma."""

from __future__ import annotations

from typing import Any

from raytune_vlm.models.tiny.parts import ends, no_videos, text_config, tokenizer, tower

_TURNS = (
    "<bos>{% for message in messages %}OPEN"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}CLOSE\n{% endfor %}"
    "{% if add_generation_prompt %}OPENmodel\n{% endif %}"
)


def _turns(opening: str, closing: str, image: str) -> str:
    return _TURNS.replace("OPEN", opening).replace("CLOSE", closing).replace("IMAGE", image)


def _tokenizer(opening: str, closing: str, **media: str) -> Any:
    return tokenizer(
        opening,
        closing,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=media,
    )


def gemma3() -> tuple[Any, Any]:
    """`gemma3`."""
    import torch
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    tokens = _tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    number = tokens.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=text_config(
            **{**ends(tokens, bos=True), "eos_token_id": number("<end_of_turn>")},
            head_dim=16,
            sliding_window=64,
            query_pre_attn_scalar=16,
        ),
        vision_config=tower(image_size=56, patch_size=14, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=number("<image_soft_token>"),
        boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"),
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=tokens,
        chat_template=_turns("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        image_seq_length=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    # transformers initialises Gemma 3's projection with zeros: images would have no effect.
    projector = model.model.multi_modal_projector
    torch.nn.init.normal_(projector.mm_input_projection_weight, std=0.05)
    return model, processor


def gemma4() -> tuple[Any, Any]:
    """`gemma4`."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessorPil,
        Gemma4Processor,
    )

    tokens = _tokenizer(
        "<|turn>",
        "<turn|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        image_token="<|image|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
        audio_token="<|audio|>",
    )
    tokens.add_tokens(["<|channel>", "<channel|>"], special_tokens=True)
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(
            patch_size=8, max_soft_tokens=70, pooling_kernel_size=2
        ),
        tokenizer=tokens,
        video_processor=no_videos(),
        chat_template=_turns("<|turn>", "<turn|>", "<|image|>").replace(
            "model\n{% endif %}", "model\n<|channel>thought\n<channel|>{% endif %}"
        ),
    )
    number = tokens.convert_tokens_to_ids
    config = Gemma4Config(
        text_config=text_config(
            **{**ends(tokens, bos=True), "eos_token_id": number("<turn|>")},
            head_dim=16,
            global_head_dim=16,
            sliding_window=64,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokens),
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=tower(
            patch_size=8,
            pooling_kernel_size=2,
            head_dim=16,
            global_head_dim=16,
            num_key_value_heads=2,
            position_embedding_size=256,
        ),
        audio_config=None,
        image_token_id=number("<|image|>"),
        video_token_id=number("<|video|>"),
        audio_token_id=number("<|audio|>"),
        boi_token_id=number("<|image>"),
        eoi_token_id=number("<image|>"),
    )
    return Gemma4ForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    """`paligemma`; no chat template: prompt and answer are a prefix and a suffix."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
    )

    tokens = tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokens)
    config = PaliGemmaConfig(
        text_config=text_config(**ends(tokens, bos=True), model_type="gemma", head_dim=16),
        vision_config=tower(
            model_type="siglip_vision_model",
            image_size=28,
            patch_size=14,
            vision_use_head=False,
        ),
        projection_dim=64,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )
    return PaliGemmaForConditionalGeneration(config), processor
