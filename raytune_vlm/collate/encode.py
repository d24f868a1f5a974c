"""One conversation with its images -> token ids, labelled spans and media tensors.

The processor does the work of its family (templates, image tokens, resizing); pixels leave it as
uint8, before rescaling and normalisation, which `collate.batch.PixelTable` does on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from raytune_vlm.collate.chat import ChatPrompts, is_aligned
from raytune_vlm.collate.encoded import Encoded, SampleRefused
from raytune_vlm.collate.labels import structural_tokens
from raytune_vlm.collate.pixels import fast_image_processor
from raytune_vlm.collate.single_turn import (
    EncoderDecoderPrompts,
    ImageEncoderPrompts,
    PrefixPrompts,
)
from raytune_vlm.models.families import Family
from raytune_vlm.models.image_backends import ImageBackend

_PROMPTS: dict[str, Any] = {
    "chat": ChatPrompts,
    "prefix": PrefixPrompts,
    "encoder-decoder": EncoderDecoderPrompts,
    "image-encoder": ImageEncoderPrompts,
}
"""`Family.prompt` -> the class that makes tokens of a conversation."""

_MEDIA_TOKENS = (
    *("image_token", "video_token", "audio_token", "fake_image_token", "global_image_tag"),
    *("boi_token", "eoi_token", "boa_token", "eoa_token"),
    *("start_image_token", "end_image_token", "context_image_token"),
    *("vision_start_token", "vision_end_token", "vision_bos_token", "vision_eos_token"),
    *("audio_bos_token", "audio_eos_token", "audio_start_token", "audio_end_token"),
    *("image_start_token", "image_break_token", "image_end_token"),
)
"""What processors and tokenizers of transformers call the tokens that belong to media."""


class Encoder:
    """Encodes samples with one processor.

    Parameters
    ----------
    backend
        What resamples the images; None: what the image processor's class is built on.
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
        backend: ImageBackend | None = None,
        *,
        sizes_only: bool = False,
    ) -> None:
        self.processor = copy.copy(processor)
        self.processor.image_processor = fast_image_processor(
            processor.image_processor, family, backend, sizes_only=sizes_only
        )
        self.family = family
        self._prompts = _PROMPTS[family.prompt](self.processor, family)
        self._control = sorted(structural_tokens(processor.tokenizer, family).values())
        self._media_ids = media_ids(processor)

    def training(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image],
        tools: Sequence[dict[str, Any]] = (),
    ) -> Encoded:
        """Encode a whole conversation with labels on the assistant's turns.

        Raises
        ------
        SampleRefused
            If a text contains a control token of the tokenizer, images and their places do not
            agree, the family has no place for the turns, or a label would stand on a media token.
        """
        self._check(messages, images, tools)
        encoded: Encoded = self._prompts.training(messages, images, tools)
        labelled = np.concatenate([encoded.input_ids[start:end] for start, end in encoded.spans])
        if np.isin(labelled, self._media_ids).any():
            raise SampleRefused("a media token stands inside an assistant turn")
        return encoded

    def prompt(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image],
        tools: Sequence[dict[str, Any]] = (),
    ) -> Encoded:
        """Encode a conversation that ends before the turn that the model shall write."""
        self._check(messages, images, tools)
        encoded: Encoded = self._prompts.prompt(messages, images, tools)
        return encoded

    def _check(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image],
        tools: Sequence[dict[str, Any]],
    ) -> None:
        places = sum(part["type"] == "image" for message in messages for part in message["content"])
        if places != len(images):
            raise SampleRefused(f"{places} places for images but {len(images)} images")
        texts = [
            (f"the {message['role']}'s text", part.get("text") or "")
            for message in messages
            for part in message["content"]
        ]
        calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
        texts += [(name, str(value)) for name, value in (("a tool call", calls), ("a tool", tools))]
        for what, text in texts:
            for token in self._control:
                if token in text:
                    raise SampleRefused(f"{what} contains the control token {token!r}")

    def blank(self) -> Encoded:
        """A sample of one grey image that carries no loss.

        Appended to a batch of text alone, it takes every rank through the vision tower, which the
        collectives of FSDP and ZeRO wait for.
        """
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}
        return self.prompt([asked], [Image.new("RGB", (64, 64), (128, 128, 128))])

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
            name: array[:max_length] if is_aligned(name, array, length, self.family) else array
            for name, array in encoded.tensors.items()
        }
        return Encoded(encoded.input_ids[:max_length], spans, tensors)


def media_ids(processor: Any) -> np.ndarray:
    """The ids of all tokens that belong to media, sorted."""
    tokenizer = processor.tokenizer
    tokens = {
        str(token)
        for holder in (processor, tokenizer)
        for name in _MEDIA_TOKENS
        if (token := getattr(holder, name, None))
    }
    known = tokenizer.get_vocab()
    return np.array(sorted(known[token] for token in tokens if token in known), dtype=np.int64)
