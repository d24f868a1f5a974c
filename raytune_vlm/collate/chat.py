"""Conversations through the chat template of the model's processor."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_vlm.collate.encoded import Encoded, SampleRefused, Span
from raytune_vlm.collate.labels import find_markers, spans_of_markers, spans_of_mask
from raytune_vlm.collate.pixels import media_tensors
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import Family

if TYPE_CHECKING:
    from PIL import Image


class ChatPrompts:
    """Encodes conversations with a chat template.

    Raises
    ------
    ModelError
        If the processor has no chat template, or its assistant turns cannot be found.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
        if not isinstance(template, str):
            raise ModelError(f"{type(processor).__name__} has no chat template")
        self._processor, self._family = processor, family
        has_generation = "{% generation" in template or "{%- generation" in template
        self._markers = None if has_generation else find_markers(processor)

    def training(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image],
        tools: Sequence[dict[str, Any]],
    ) -> Encoded:
        """The whole conversation, labelled on the assistant's turns."""
        inputs = self._apply(messages, images, tools, mask=self._markers is None)
        mask = inputs.pop("assistant_masks", None)
        encoded = self._encoded(inputs)
        if self._markers is None:
            spans = spans_of_mask(mask[0].tolist() if mask is not None else [])
            self._check_answers(messages, encoded, spans)
        else:
            spans = spans_of_markers(encoded.input_ids.tolist(), self._markers)
        num_turns = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != num_turns:
            raise SampleRefused(
                f"{num_turns} assistant turns but {len(spans)} labelled spans in the tokens"
            )
        encoded = Encoded(encoded.input_ids, spans, encoded.tensors)
        if self._markers is not None and self._markers.prefix:
            return self._prefixed(encoded, np.array(self._markers.prefix, dtype=np.int32))
        return encoded

    def _check_answers(
        self, messages: list[dict[str, Any]], encoded: Encoded, spans: list[Span]
    ) -> None:
        """Refuse a sample whose mask does not lie on its answers.

        Nemotron's processor expands image tokens without moving the mask
        (transformers/models/nemotron_h_omni/processing_nemotron_h_omni.py, `__call__`).
        """
        tokenizer = self._processor.tokenizer
        answers = [message for message in messages if message["role"] == "assistant"]
        for message, (start, end) in zip(answers, spans, strict=False):
            labelled = _decoded(tokenizer, encoded.input_ids[start:end])
            text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
            answer = text.strip()
            if answer in labelled:
                continue
            # A tokenizer may normalise what it reads.
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            if _decoded(tokenizer, ids).strip() not in labelled:
                seen, asked = (shorten(what, 60, placeholder="...") for what in (labelled, answer))
                raise SampleRefused(
                    f"the chat template's mask lies on {seen!r}, not on the answer {asked!r}"
                )

    def prompt(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image],
        tools: Sequence[dict[str, Any]],
    ) -> Encoded:
        """The conversation and the opening of the turn that the model shall write."""
        return self._encoded(self._apply(messages, images, tools, generation_prompt=True))

    def _apply(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image],
        tools: Sequence[dict[str, Any]],
        *,
        mask: bool = False,
        generation_prompt: bool = False,
    ) -> dict[str, Any]:
        pixels = iter(images)
        conversation = [
            {
                **message,
                "content": [
                    {"type": "image", "image": next(pixels)}
                    if part["type"] == "image"
                    else {"type": "text", "text": part["text"]}
                    for part in message["content"] or [{"type": "text", "text": ""}]
                ],
            }
            for message in messages
        ]
        if tools or any("tool_calls" in message for message in messages):
            self._check_tools(conversation, tools)
        return dict(
            self._processor.apply_chat_template(
                [conversation],
                tools=list(tools) or None,
                tokenize=True,
                return_dict=True,
                return_tensors="np",
                return_assistant_tokens_mask=mask,
                add_generation_prompt=generation_prompt,
                processor_kwargs={"do_rescale": False, "do_normalize": False},
            )
        )

    def _check_tools(
        self, conversation: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> None:
        """Raise SampleRefused where the template leaves tools, calls or their answers out."""
        text = self._processor.apply_chat_template(
            conversation, tools=list(tools) or None, tokenize=False
        )
        names = [tool.get("function", tool).get("name", "") for tool in tools]
        for message in conversation:
            names += [call["function"]["name"] for call in message.get("tool_calls", ())]
            if message["role"] == "tool":
                names += [part["text"].strip() for part in message["content"]]
        for name in names:
            if name not in text:
                raise SampleRefused(
                    f"the chat template of {type(self._processor).__name__} leaves out tools: "
                    f"{name!r} is not in the rendered conversation"
                )

    def _encoded(self, inputs: dict[str, Any]) -> Encoded:
        input_ids = np.asarray(inputs.pop("input_ids"))[0].astype(np.int32)
        inputs.pop("attention_mask", None)
        return Encoded(input_ids, [], media_tensors(inputs, self._family))

    def _prefixed(self, encoded: Encoded, prefix: np.ndarray) -> Encoded:
        """The sample with the answer prefix ahead of each labelled span, itself not labelled."""
        starts = [start for start, _ in encoded.spans]
        length, size = len(encoded.input_ids), len(prefix)

        def inserted(array: np.ndarray, values: np.ndarray) -> np.ndarray:
            pieces = np.split(array, starts)
            parts = [pieces[0], *(part for piece in pieces[1:] for part in (values, piece))]
            return np.concatenate(parts).astype(array.dtype)

        tensors = {
            name: inserted(array, np.zeros((size, *array.shape[1:]), array.dtype))
            if is_aligned(name, array, length, self._family)
            else array
            for name, array in encoded.tensors.items()
        }
        spans: list[Span] = [
            (start + (number + 1) * size, end + (number + 1) * size)
            for number, (start, end) in enumerate(encoded.spans)
        ]
        return Encoded(inserted(encoded.input_ids, prefix), spans, tensors)


def _decoded(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def is_aligned(name: str, array: np.ndarray, length: int, family: Family) -> bool:
    """Whether a tensor of a sample has an entry for every token."""
    return family.media.get(name, "tokens") == "tokens" and array.shape[:1] == (length,)
