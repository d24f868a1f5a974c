"""Tiny Pixtral (a LLaVA with Pixtral's vision tower) and Mistral 3."""

from __future__ import annotations

from typing import Any

from raytune_vlm.models.tiny.parts import ends, text_config, tokenizer, tower

_PATCH = 14
_INST = (
    "<s>{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% elif message['role'] == 'system' %}[SYSTEM_PROMPT]"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]{% endif %}{% endfor %}"
)


def _tokenizer() -> Any:
    return tokenizer(
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def _processor(tokens: Any, spatial_merge_size: int) -> Any:
    from transformers import PixtralImageProcessorPil, PixtralProcessor

    return PixtralProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": 6 * _PATCH}, patch_size={"height": _PATCH, "width": _PATCH}
        ),
        tokenizer=tokens,
        patch_size=_PATCH,
        spatial_merge_size=spatial_merge_size,
        chat_template=_INST,
    )


def _tower() -> dict[str, Any]:
    return tower(model_type="pixtral", image_size=6 * _PATCH, patch_size=_PATCH, head_dim=16)


def pixtral() -> tuple[Any, Any]:
    """`pixtral`; its `config.json` names `llava`."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokens = _tokenizer()
    config = LlavaConfig(
        text_config=text_config(**ends(tokens, bos=True), model_type="mistral", head_dim=16),
        vision_config=_tower(),
        image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), _processor(tokens, 1)


def mistral3() -> tuple[Any, Any]:
    """`mistral3`."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokens = _tokenizer()
    config = Mistral3Config(
        text_config=text_config(**ends(tokens, bos=True), model_type="mistral", head_dim=16),
        vision_config=_tower(),
        image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    return Mistral3ForConditionalGeneration(config), _processor(tokens, 2)
