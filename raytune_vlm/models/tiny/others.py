"""Tiny Idefics3, SmolVLM and Mllama."""

from __future__ import annotations

from typing import Any

from raytune_vlm.models.tiny.parts import ends, no_videos, text_config, tokenizer, tower

_IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] == 'text' %} {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}"
    "<end_of_utterance>{% endgeneration %}{% else %}{{ part['text'] }}<end_of_utterance>"
    "{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
_LLAMA3 = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _idefics_tokenizer() -> Any:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    around = ("<fake_token_around_image>", "<global-img>", *tiles)
    return tokenizer(
        "<|im_start|>", "<image>", *around, eos_token="<end_of_utterance>", pad_token="<pad>"
    )


def _idefics_config(tokens: Any) -> dict[str, Any]:
    start = tokens.convert_tokens_to_ids("<|im_start|>")
    return {
        "text_config": text_config(**{**ends(tokens), "bos_token_id": start}, model_type="llama"),
        "vision_config": tower(image_size=64, patch_size=8),
        "image_token_id": tokens.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
        "pad_token_id": tokens.pad_token_id,
    }


def idefics3() -> tuple[Any, Any]:
    """`idefics3`."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    tokens = _idefics_tokenizer()
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
        ),
        tokenizer=tokens,
        image_seq_len=16,
        chat_template=_IDEFICS,
    )
    return Idefics3ForConditionalGeneration(Idefics3Config(**_idefics_config(tokens))), processor


def smolvlm() -> tuple[Any, Any]:
    """`smolvlm`, cutting images into tiles."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessorPil,
        SmolVLMProcessor,
    )

    tokens = _idefics_tokenizer()
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessorPil(
            size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=True
        ),
        tokenizer=tokens,
        video_processor=no_videos(num_frames=2, fps=1),
        image_seq_len=16,
        chat_template=_IDEFICS,
    )
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**_idefics_config(tokens))), processor


def mllama() -> tuple[Any, Any]:
    """`mllama`: images are attended to across, not put between the tokens."""
    import torch
    from transformers import (
        MllamaConfig,
        MllamaForConditionalGeneration,
        MllamaImageProcessorPil,
        MllamaProcessor,
    )

    tokens = tokenizer(
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|image|>",
        "<|python_tag|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    config = MllamaConfig(
        text_config=text_config(
            **ends(tokens, bos=True),
            num_hidden_layers=3,
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
        | {"num_hidden_layers": 3},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [1],
            "supported_aspect_ratios": [
                [1, 1],
                [1, 2],
                [1, 3],
                [1, 4],
                [2, 1],
                [2, 2],
                [3, 1],
                [4, 1],
            ],
        },
        image_token_index=tokens.convert_tokens_to_ids("<|image|>"),
    )
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessorPil(
            size={"height": 28, "width": 28}, max_image_tiles=4
        ),
        tokenizer=tokens,
        chat_template=_LLAMA3,
    )
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "cross_attn" in name and name.endswith("gate"):
            # transformers starts the gates shut: images would have no effect.
            torch.nn.init.constant_(parameter, 1.0)
    return model, processor
