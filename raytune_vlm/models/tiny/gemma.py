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

    tokens = _gemma4_tokenizer()
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(
            patch_size=8, max_soft_tokens=70, pooling_kernel_size=2
        ),
        tokenizer=tokens,
        video_processor=no_videos(),
        chat_template=_GEMMA4_TURNS,
    )
    config = Gemma4Config(
        text_config=_gemma4_text(
            tokens, hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(tokens)
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
        **_gemma4_media(tokens),
    )
    return Gemma4ForConditionalGeneration(config), processor


def gemma4_unified() -> tuple[Any, Any]:
    """`gemma4_unified`; needs torchvision."""
    from transformers import (
        Gemma4UnifiedAudioFeatureExtractor,
        Gemma4UnifiedConfig,
        Gemma4UnifiedForConditionalGeneration,
        Gemma4UnifiedImageProcessor,
        Gemma4UnifiedProcessor,
    )

    tokens = _gemma4_tokenizer()
    processor = Gemma4UnifiedProcessor(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(),
        image_processor=Gemma4UnifiedImageProcessor(
            patch_size=8, max_soft_tokens=70, pooling_kernel_size=2
        ),
        tokenizer=tokens,
        video_processor=no_videos(),
        chat_template=_GEMMA4_TURNS,
    )
    config = Gemma4UnifiedConfig(
        text_config=_gemma4_text(tokens),
        vision_config={
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 70,
            "output_proj_dims": 32,
        },
        audio_config=None,
        **_gemma4_media(tokens),
    )
    return Gemma4UnifiedForConditionalGeneration(config), processor


_GEMMA4_TURNS = _turns("<|turn>", "<turn|>", "<|image|>").replace(
    "model\n{% endif %}", "model\n<|channel>thought\n<channel|>{% endif %}"
)


def _gemma4_tokenizer() -> Any:
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
    return tokens


def _gemma4_text(tokens: Any, **more: Any) -> dict[str, Any]:
    return text_config(
        **{**ends(tokens, bos=True), "eos_token_id": tokens.convert_tokens_to_ids("<turn|>")},
        head_dim=16,
        global_head_dim=16,
        sliding_window=64,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        **more,
    )


def _gemma4_media(tokens: Any) -> dict[str, int]:
    """The ids of the media tokens; the processor has added that of videos before."""
    names = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "audio_token_id": "<|audio|>",
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
    }
    return {name: tokens.convert_tokens_to_ids(token) for name, token in names.items()}


def gemma3n() -> tuple[Any, Any]:
    """`gemma3n`, with a small network of timm in the place of MobileNet-V5; needs torchvision.

    MobileNet-V5 has one size only, 300 million parameters.
    """
    from transformers import (
        Gemma3nAudioFeatureExtractor,
        Gemma3nConfig,
        Gemma3nForConditionalGeneration,
        Gemma3nProcessor,
        SiglipImageProcessorPil,
    )

    tokens = _tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        boa_token="<start_of_audio>",
        eoa_token="<end_of_audio>",
        audio_token="<audio_soft_token>",
    )
    number = tokens.convert_tokens_to_ids
    processor = Gemma3nProcessor(
        feature_extractor=Gemma3nAudioFeatureExtractor(),
        image_processor=SiglipImageProcessorPil(size={"height": 64, "width": 64}),
        tokenizer=tokens,
        chat_template=_turns("<start_of_turn>", "<end_of_turn>", "<image_soft_token>"),
        image_seq_length=4,
    )
    config = Gemma3nConfig(
        text_config=text_config(
            **{**ends(tokens, bos=True), "eos_token_id": number("<end_of_turn>")},
            head_dim=16,
            sliding_window=64,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokens),
            num_kv_shared_layers=0,
            laurel_rank=8,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0, 0.0],
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={
            "architecture": "test_efficientnet_ln",
            "hidden_size": 256,
            "vocab_size": 8,
            "vocab_offset": len(tokens),
        },
        audio_config={
            "hidden_size": 32,
            "vocab_size": 8,
            "vocab_offset": len(tokens) + 8,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "sscp_conv_channel_size": [8, 8],
        },
        vision_soft_tokens_per_image=4,
        image_token_id=number("<image_soft_token>"),
        audio_token_id=number("<audio_soft_token>"),
        boi_token_id=number("<start_of_image>"),
        eoi_token_id=number("<end_of_image>"),
    )
    return Gemma3nForConditionalGeneration(config), processor


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
