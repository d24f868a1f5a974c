"""One conversation with its images -> token ids, labelled spans and media tensors.

The processor does the work of its family (templates, image tokens, resizing); pixels leave it as
uint8, before rescaling and normalisation, which `collate.batch.PixelTable` does on the device.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.labels import (
    control_tokens,
    find_markers,
    spans_of_markers,
    spans_of_mask,
)
from raytune_vlm.collate.pixels import fast_image_processor, media_tensors
from raytune_vlm.errors import DataError, ModelError
from raytune_vlm.models.families import Family
from raytune_vlm.models.loading import ImageBackend

if TYPE_CHECKING:
    from PIL import Image


class SampleRefused(DataError):
    """This one sample cannot be used; the reason is its message."""


class Encoder:
    """Encodes samples with one processor.

    Parameters
    ----------
    sizes_only
        Leave the pixels blank: for token ids, labels and sizes alone.

    Raises
    ------
    ModelError
        If the processor has no chat template, or its assistant turns cannot be found.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        backend: ImageBackend = "pil",
        *,
        sizes_only: bool = False,
    ) -> None:
        template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
        if not isinstance(template, str):
            raise ModelError(f"{type(processor).__name__} has no chat template")
        self.processor = copy.copy(processor)
        self.processor.image_processor = fast_image_processor(
            processor.image_processor, family, backend, sizes_only=sizes_only
        )
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
        return Encoded(input_ids, [], media_tensors(inputs, self.family))

    def num_media(self, encoded: Encoded) -> int:
        """Tokens that stand for media."""
        return int(np.isin(encoded.input_ids, self._media_ids).sum())

    def truncated(self, encoded: Encoded, max_length: int) -> Encoded | None:
        """The sample cut to its first `max_length` tokens, with its media whole.

        Returns
        -------
        Encoded or None
            None if a media token would be cut away, or no labelled token is left.
        """
        if np.isin(encoded.input_ids[max_length:], self._media_ids).any():
            return None
        length = len(encoded.input_ids)
        spans = [
            (start, min(end, max_length)) for start, end in encoded.spans if start < max_length
        ]
        if not spans:
            return None
        tensors = {
            name: array[:max_length]
            if name not in self.family.media and array.shape[:1] == (length,)
            else array
            for name, array in encoded.tensors.items()
        }
        return Encoded(encoded.input_ids[:max_length], spans, tensors)


def _media_ids(processor: Any) -> np.ndarray:
    tokenizer = processor.tokenizer
    names = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    names += [getattr(tokenizer, name, None) for name in ("image_token", "boi_token", "eoi_token")]
    tokens = {str(name) for name in names if name}
    return np.array(sorted(tokenizer.convert_tokens_to_ids(list(tokens))), dtype=np.int64)
