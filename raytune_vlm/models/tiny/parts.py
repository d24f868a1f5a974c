"""What the tiny models share: a tokenizer, chat templates, sizes."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% for call in message['tool_calls'] or [] %}<tool_call>"
    "{{ call['function'] | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's template, to be used with `.replace("IMAGE", ...)`."""

VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: "
    "{% for part in message['content'] %}{% generation %}{{ part['text'] }}</s>{% endgeneration %}"
    "{% endfor %}"
    "{% else %}{{ 'USER: ' if message['role'] == 'user' else 'SYSTEM: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""LLaVA-1.5's, with a generation block: its turns are opened by plain text."""


def tokenizer(*specials: str, **named: Any) -> Any:
    """A byte-level tokenizer without merges, so that any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    made.add_tokens(list(specials), special_tokens=True)
    return made


def text_config(**more: Any) -> dict[str, Any]:
    """Sizes of a language model of two layers."""
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **more,
    }


def tower(**more: Any) -> dict[str, Any]:
    """Sizes of a vision tower of two layers."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **more,
    }


def ends(tokenizer: Any, *, bos: bool = False) -> dict[str, Any]:
    """The token ids that a text config names."""
    return {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id if bos else None,
    }


def no_videos(**attributes: Any) -> Any:
    """What fills the video slot of an image-text processor where torchvision is absent."""
    from transformers.video_processing_utils import VideoProcessorMixin

    slot = VideoProcessorMixin()
    for name, value in attributes.items():
        setattr(slot, name, value)
    return slot
