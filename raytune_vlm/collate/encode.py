"""One conversation with its images -> token ids, labelled spans and media tensors.

The processor does the work of its family (templates, image tokens, resizing); pixels leave it as
uint8, before rescaling and normalisation, which `collate.batch.PixelTable` does on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_vlm.collate.labels import (
    Span,
    control_tokens,
    find_markers,
    spans_of_markers,
    spans_of_mask,
)
from raytune_vlm.errors import DataError, ModelError
from raytune_vlm.models.families import Family

if TYPE_CHECKING:
    from PIL import Image


class SampleRefused(DataError):
    """This one sample cannot be used; the reason is its message."""


@dataclass(frozen=True)
class Encoded:
    """A sample as the model takes it, not padded.

    Attributes
    ----------
    input_ids
        int32 `[length]`, image tokens already expanded.
    spans
        Half-open ranges of `input_ids` that carry loss: the assistant's turns, each with its
        end-of-turn token. Empty for a prompt that is to be answered.
    tensors
        Everything else the processor gave, by name: media tensors (pixels as uint8) and
        token-aligned tensors `[length]`.
    """

    input_ids: np.ndarray
    spans: list[Span]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_labelled(self) -> int:
        """Tokens that carry loss."""
        return sum(end - start for start, end in self.spans)


class Encoder:
    """Encodes samples with one processor.

    Raises
    ------
    ModelError
        If the processor has no chat template, or its assistant turns cannot be found.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
        if not isinstance(template, str):
            raise ModelError(f"{type(processor).__name__} has no chat template")
        self.processor = processor
        self.family = family
        self._has_generation = "{% generation" in template or "{%- generation" in template
        self._markers = None if self._has_generation else find_markers(processor)
        self._control = sorted(filter(None, control_tokens(processor.tokenizer).values()))
        self._media_ids = _media_ids(processor)

    def training(self, messages: list[dict[str, Any]], images: list[Image.Image]) -> Encoded:
        """Encode a whole conversation with labels on the assistant's turns.

        Raises
        ------
        SampleRefused
            If a text contains a control token of the tokenizer, or nothing would be labelled.
        """
        inputs = self._apply(messages, images, mask=self._has_generation)
        mask = inputs.pop("assistant_masks", None)
        encoded = self._encoded(inputs)
        if self._markers is None:
            spans = spans_of_mask(mask[0].tolist() if mask is not None else [])
        else:
            spans = spans_of_markers(encoded.input_ids.tolist(), self._markers)
        num_turns = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != num_turns:
            raise SampleRefused(
                f"{num_turns} assistant turns but {len(spans)} labelled spans in the tokens"
            )
        labelled = np.concatenate([encoded.input_ids[start:end] for start, end in spans])
        if np.isin(labelled, self._media_ids).any():
            raise SampleRefused("a media token stands inside an assistant turn")
        return Encoded(encoded.input_ids, spans, encoded.tensors)

    def prompt(self, messages: list[dict[str, Any]], images: list[Image.Image]) -> Encoded:
        """Encode a conversation that ends before the turn that the model shall write."""
        return self._encoded(self._apply(messages, images, generation_prompt=True))

    def _apply(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image],
        *,
        mask: bool = False,
        generation_prompt: bool = False,
    ) -> dict[str, Any]:
        self._refuse_control_tokens(messages)
        pixels = iter(images)
        conversation = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": next(pixels)}
                    if part["type"] == "image"
                    else {"type": "text", "text": part["text"]}
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        return dict(
            self.processor.apply_chat_template(
                [conversation],
                tokenize=True,
                return_dict=True,
                return_tensors="np",
                return_assistant_tokens_mask=mask,
                add_generation_prompt=generation_prompt,
                processor_kwargs={"do_rescale": False, "do_normalize": False},
            )
        )

    def _refuse_control_tokens(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            for part in message["content"]:
                text = part.get("text") or ""
                for token in self._control:
                    if token in text:
                        raise SampleRefused(
                            f"the {message['role']}'s text contains the control token {token!r}"
                        )

    def _encoded(self, inputs: dict[str, Any]) -> Encoded:
        input_ids = np.asarray(inputs.pop("input_ids"))[0].astype(np.int32)
        inputs.pop("attention_mask", None)
        tensors = {}
        for name, value in inputs.items():
            array = np.asarray(value)
            if name not in self.family.media or self.family.media[name] == "samples":
                array = array[0]
            tensors[name] = _compact(name, array)
        return Encoded(input_ids, [], tensors)


def _media_ids(processor: Any) -> np.ndarray:
    tokenizer = processor.tokenizer
    names = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    names += [getattr(tokenizer, name, None) for name in ("image_token", "boi_token", "eoi_token")]
    tokens = {str(name) for name in names if name}
    return np.array(sorted(tokenizer.convert_tokens_to_ids(list(tokens))), dtype=np.int64)


def _compact(name: str, array: np.ndarray) -> np.ndarray:
    """Pixels as uint8, masks as int8, indices as int32; refuses to lose anything."""
    if name == "pixel_values":
        small = array.astype(np.uint8)
        if not np.array_equal(small, array):
            raise ModelError(
                f"{name} holds values that are not whole numbers of 0..255 before normalisation"
            )
        return small
    if array.dtype.kind in "iub":
        limits = np.iinfo(np.int8)
        fits = array.size == 0 or (array.min() >= limits.min and array.max() <= limits.max)
        return array.astype(np.int8 if fits else np.int32)
    return array
