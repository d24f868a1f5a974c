"""Tiny Kimi K2.5, Phi-4-multimodal and Nemotron Omni: their processors need torchvision."""

from __future__ import annotations

from typing import Any

from raytune_vlm.models.tiny.parts import CHATML, ends, no_videos, text_config, tokenizer, tower

_KIMI = (
    "{% for message in messages %}<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
_PHI = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def kimi_k25() -> tuple[Any, Any]:
    """`kimi_k25`."""
    from transformers import (
        Kimi_K25Config,
        Kimi_K25ForConditionalGeneration,
        Kimi_K25ImageProcessor,
        Kimi_K25Processor,
    )

    roles = [f"<|im_{role}|>" for role in ("user", "assistant", "system", "middle")]
    media = [f"<|media_{part}|>" for part in ("begin", "content", "end", "pad")]
    tokens = tokenizer(
        *roles,
        *media,
        "<|kimi_k25_video_placeholder|>",
        eos_token="<|im_end|>",
        pad_token="[PAD]",
    )
    number = tokens.convert_tokens_to_ids
    config = Kimi_K25Config(
        text_config=text_config(
            **ends(tokens),
            model_type="deepseek_v3",
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
        )
        | {"num_key_value_heads": 4},
        vision_config=tower(pos_emb_height=8, pos_emb_width=8),
        projection_hidden_size=32,
        image_token_id=number("<|media_pad|>"),
        video_token_id=number("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=number("<|media_begin|>"),
        vision_end_token_id=number("<|media_end|>"),
    )
    processor = Kimi_K25Processor(
        image_processor=Kimi_K25ImageProcessor(
            size={"max_height": 8, "max_width": 8}, max_patches=36
        ),
        tokenizer=tokens,
        video_processor=no_videos(merge_size=2, temporal_patch_size=4),
        chat_template=_KIMI,
    )
    return Kimi_K25ForConditionalGeneration(config), processor


def phi4_multimodal() -> tuple[Any, Any]:
    """`phi4_multimodal`; the number of tokens of a crop of 448 by 448 is fixed in its processor."""
    from transformers import (
        Phi4MultimodalConfig,
        Phi4MultimodalFeatureExtractor,
        Phi4MultimodalForCausalLM,
        Phi4MultimodalImageProcessor,
        Phi4MultimodalProcessor,
    )

    tokens = tokenizer(
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "audio_token": "<|audio|>"},
    )
    number = tokens.convert_tokens_to_ids
    config = Phi4MultimodalConfig(
        **text_config(**ends(tokens, bos=True)),
        original_max_position_embeddings=131072,
        vision_config=tower(image_token_id=number("<|image|>"), feature_layer=-1),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "audio_token_id": number("<|audio|>"),
        },
    )
    processor = Phi4MultimodalProcessor(
        image_processor=Phi4MultimodalImageProcessor(dynamic_hd=2),
        audio_processor=Phi4MultimodalFeatureExtractor(),
        tokenizer=tokens,
        chat_template=_PHI,
    )
    return Phi4MultimodalForCausalLM(config), processor


def nemotron_h_omni() -> tuple[Any, Any]:
    """`nemotron_h_omni`, without a generation block: the mask of its processor is shifted."""
    from transformers import (
        NemotronH_Omni_Reasoning_V3,
        NemotronH_Omni_Reasoning_V3_Config,
        NemotronH_Omni_Reasoning_V3ImageProcessor,
        NemotronH_Omni_Reasoning_V3Processor,
        ParakeetFeatureExtractor,
    )

    tokens = tokenizer(
        "<|im_start|>",
        "<so_start>",
        "<so_end>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "audio_token": "<so_embedding>",
            "image_start_token": "<img>",
            "image_end_token": "</img>",
        },
    )
    number = tokens.convert_tokens_to_ids
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config={
            **text_config(**ends(tokens)),
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "head_dim": 16,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        vision_config=tower(
            image_size=64,
            patch_size=16,
            max_img_size=64,
            num_cls_tokens=1,
            num_registers=1,
            video_temporal_patch_size=2,
        ),
        projector_hidden_size=48,
        vision_hidden_size=32,
        image_token_id=number("<image>"),
        video_token_id=number("<video>"),
        audio_token_id=number("<so_embedding>"),
    )
    processor = NemotronH_Omni_Reasoning_V3Processor(
        image_processor=NemotronH_Omni_Reasoning_V3ImageProcessor(
            min_num_patches=4, max_num_patches=16
        ),
        video_processor=no_videos(),
        tokenizer=tokens,
        feature_extractor=ParakeetFeatureExtractor(),
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    return NemotronH_Omni_Reasoning_V3(config), processor
