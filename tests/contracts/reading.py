"""A slow, independent reading of what a sample's tokens must be: by text, never by token ids."""

from __future__ import annotations

import re
from typing import Any

from made import picture, turn
from PIL import Image

from raytune_vlm.collate.labels import control_tokens
from raytune_vlm.models.families import FAMILIES, Family
from raytune_vlm.models.loading import Base

NASTY = [
    "assistant\n",
    "ASSISTANT: ",
    "<|im_start",
    "im_start|>assistant",
    "model\nyes",
    "USER: what? ASSISTANT: no",
    "<image",
    "</s",
    "{{ text }}",
    "{% generation %}",
    "  ",
    "\n\n",
    "é漢🙂",
]
"""Pieces of texts that look like structure and are none."""


def is_single_turn(model_type: str) -> bool:
    """Whether the family takes one question and one answer only."""
    return FAMILIES[model_type].prompt != "chat"


def num_images(model_type: str, wanted: int) -> int:
    """As many images as the family takes, near what is wanted."""
    family = FAMILIES[model_type]
    if family.max_images is not None:
        return family.max_images
    return max(wanted, 1) if family.prompt == "prefix" else wanted


def sample(
    model_type: str, *texts: str, images: int = 1, seed: int = 0, width: int = 64, height: int = 48
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Question, answer, question, ... with the images before the first question."""
    if is_single_turn(model_type):
        texts = texts[:2]
    count = num_images(model_type, images)
    messages = [
        turn("assistant" if place % 2 else "user", text, 0 if place else count)
        for place, text in enumerate(texts)
    ]
    pictures = [picture(seed + place, width + 9 * place, height) for place in range(count)]
    return messages, pictures


def expected_texts(base: Base, messages: list[dict[str, Any]]) -> tuple[list[str], str]:
    """The labelled texts in order, and what is left without structure and blanks."""
    tokenizer, family = base.processor.tokenizer, base.family
    answers = [_text(message) for message in messages if message["role"] == "assistant"]
    if family.prompt != "chat":
        opening = tokenizer.bos_token if family.prompt == "encoder-decoder" else ""
        asked = _text(messages[0])
        # Florence-2's question is read by the encoder.
        left = "" if family.prompt == "encoder-decoder" else asked
        return [f"{opening}{answers[0]}{tokenizer.eos_token}"], plain(left, base)
    marks = [f"\ue000{place}\ue001" for place in range(len(answers))]
    rendered = _render(base, _with_answers(messages, marks))
    labelled, left, rest = [], [], rendered
    for mark, answer in zip(marks, answers, strict=True):
        before, rest = rest.split(mark)
        end = min(
            (rest.index(token) + len(token), token)
            for token in control_tokens(tokenizer).values()
            if token in rest
        )[0]
        stripped = mark in _render(base, _with_answers(messages, [f"  {one} " for one in marks]))
        trims = f"  {mark} " not in _render(
            base, _with_answers(messages, [f"  {one} " for one in marks])
        )
        assert stripped
        labelled.append((answer.strip() if trims else answer) + rest[:end])
        left.append(before)
        rest = rest[end:]
    return labelled, plain("".join([*left, rest]), base)


def plain(text: str, base: Base) -> str:
    """A text without control tokens, image tags and blanks: those the processors add freely."""
    for token in sorted(control_tokens(base.processor.tokenizer).values(), key=len, reverse=True):
        text = text.replace(token, "")
    return re.sub(r"\s+", "", text)


def _with_answers(messages: list[dict[str, Any]], answers: list[str]) -> list[dict[str, Any]]:
    remaining = iter(answers)
    return [
        turn("assistant", next(remaining)) if message["role"] == "assistant" else message
        for message in messages
    ]


def _render(base: Base, messages: list[dict[str, Any]]) -> str:
    return str(base.processor.apply_chat_template(messages, tokenize=False))


def _text(message: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def without_answer_prefix(text: str, family: Family) -> str:
    """A text without Gemma 4's empty thinking channel, which is not in rendered conversations."""
    return text.replace("thought", "") if family.model_type.startswith("gemma4") else text
