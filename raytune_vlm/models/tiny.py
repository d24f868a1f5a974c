"""Tiny random models of the real classes, with real processors built offline.

For tests and dry runs: `write_tiny_model("qwen2_5_vl", folder)` leaves a folder that the program
takes as `model.name`. Tokenizers are byte-level with no merges, so any text round-trips.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_vlm.errors import did_you_mean

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "<bos>{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] == 'text' %} {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}"
    "<end_of_utterance>{% endgeneration %}{% else %}{{ part['text'] }}<end_of_utterance>"
    "{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def write_tiny_model(model_type: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny random model of a family and its processor into a folder.

    Raises
    ------
    KeyError
        If there is no tiny model for the family; the message names those there are.
    """
    from raytune_vlm.models.loading import allow_missing_video_processor

    if model_type not in BUILDERS:
        raise KeyError(f"no tiny model for {model_type!r}{did_you_mean(model_type, BUILDERS)}")
    import torch

    allow_missing_video_processor()
    torch.manual_seed(seed)
    model, processor = BUILDERS[model_type]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(*specials: str, **named: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.add_tokens(list(specials), special_tokens=True)
    return tokenizer


def _text_config() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
    )
    from transformers.video_processing_utils import VideoProcessorMixin

    vision = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(
        "<|im_start|>", *vision, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    identity = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **_text_config(),
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e4,
            },
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=identity("<|image_pad|>"),
        video_token_id=identity("<|video_pad|>"),
        vision_start_token_id=identity("<|vision_start|>"),
        vision_end_token_id=identity("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 16}
    )
    video = VideoProcessorMixin()
    video.merge_size, video.temporal_patch_size = 2, 2
    processor = Qwen2_5_VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=video, chat_template=_CHATML
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    import torch
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    tokenizer = _tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    identity = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config={
            **_text_config(),
            "head_dim": 16,
            "vocab_size": len(tokenizer),
            "sliding_window": 64,
            "query_pre_attn_scalar": 16,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": identity("<end_of_turn>"),
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        image_token_index=identity("<image_soft_token>"),
        boi_token_index=identity("<start_of_image>"),
        eoi_token_index=identity("<end_of_image>"),
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        chat_template=_GEMMA,
        image_seq_length=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    # transformers initialises Gemma 3's projection with zeros: images would have no effect.
    projector = model.model.multi_modal_projector
    torch.nn.init.normal_(projector.mm_input_projection_weight, std=0.05)
    return model, processor


def _idefics3() -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    tokenizer = _tokenizer(
        "<|im_start|>", "<image>", eos_token="<end_of_utterance>", pad_token="<pad>"
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=16,
        chat_template=_IDEFICS,
    )
    config = Idefics3Config(
        text_config={
            **_text_config(),
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Idefics3ForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "idefics3": _idefics3,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
}
