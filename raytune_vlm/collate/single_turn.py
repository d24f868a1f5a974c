"""Models without a chat template: one question with its images, one answer.

PaliGemma takes question and answer as prefix and suffix of one sequence; Florence-2 and Donut are
encoder-decoders, whose decoder's tokens are the sample's `input_ids` here, so that labels, lengths
and the loss mean the same as elsewhere (`collate.arrays` gives them their names).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_vlm.collate.arrays import ENCODER_IDS
from raytune_vlm.collate.encoded import Encoded, SampleRefused
from raytune_vlm.collate.labels import spans_of_mask
from raytune_vlm.collate.pixels import media_tensors
from raytune_vlm.models.families import Family

if TYPE_CHECKING:
    from PIL import Image

Messages = list[dict[str, Any]]
Tools = Sequence[dict[str, Any]]

_UNSCALED = {"do_rescale": False, "do_normalize": False}


class PrefixPrompts:
    """Question and answer as prefix and suffix (`transformers`' PaliGemmaProcessor).

    The processor puts the image tokens and `<bos>` ahead of the question and a newline behind it;
    the answer ends with `<eos>`. Token types tell the two apart: 0 is attended to both ways.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self._processor, self._family = processor, family

    def training(self, messages: Messages, images: list[Image.Image], tools: Tools) -> Encoded:
        """The whole sequence, labelled on the answer and `<eos>`."""
        question, answer = question_and_answer(messages, tools, self._family)
        inputs = self._apply(question, images, suffix=[answer])
        spans = spans_of_mask(np.asarray(inputs["token_type_ids"])[0].tolist())
        return self._encoded(inputs, spans)

    def prompt(self, messages: Messages, images: list[Image.Image], tools: Tools) -> Encoded:
        """The prefix alone."""
        question, _ = question_and_answer(messages, tools, self._family)
        return self._encoded(self._apply(question, images), [])

    def _apply(self, question: str, images: list[Image.Image], **more: Any) -> dict[str, Any]:
        if not images:
            raise SampleRefused(f"a sample without an image: {self._family.model_type} needs one")
        text = self._processor.image_token * len(images) + question
        inputs = self._processor(
            images=[images], text=[text], return_tensors="np", images_kwargs=_UNSCALED, **more
        )
        return dict(inputs)

    def _encoded(self, inputs: dict[str, Any], spans: list[tuple[int, int]]) -> Encoded:
        for name in ("labels", "attention_mask"):
            inputs.pop(name, None)
        input_ids = np.asarray(inputs.pop("input_ids"))[0].astype(np.int32)
        return Encoded(input_ids, spans, media_tensors(inputs, self._family))


class EncoderDecoderPrompts:
    """Image and question into the encoder, the answer from the decoder (Florence-2).

    The decoder's tokens are BART's: `</s>` to start with, `<s>`, the answer, `</s>`
    (`transformers/models/bart/modeling_bart.py`, `shift_tokens_right`); all but the first are
    labelled, as they are when the model's own labels are the tokenized answer.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self._processor, self._family = processor, family

    def training(self, messages: Messages, images: list[Image.Image], tools: Tools) -> Encoded:
        """Both sides."""
        question, answer = question_and_answer(messages, tools, self._family)
        tokenizer = self._processor.tokenizer
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.eos_token_id, tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        tensors = self._encoder_side(question, images)
        return Encoded(np.array(ids, dtype=np.int32), [(1, len(ids))], tensors)

    def prompt(self, messages: Messages, images: list[Image.Image], tools: Tools) -> Encoded:
        """The encoder's side, and the token that the decoder starts with."""
        question, _ = question_and_answer(messages, tools, self._family)
        start = np.array([self._processor.tokenizer.eos_token_id], dtype=np.int32)
        return Encoded(start, [], self._encoder_side(question, images))

    def _encoder_side(self, question: str, images: list[Image.Image]) -> dict[str, np.ndarray]:
        _one_image(images, self._family)
        inputs = dict(
            self._processor(
                images=images, text=[question], return_tensors="np", images_kwargs=_UNSCALED
            )
        )
        for name in ("labels", "attention_mask"):
            inputs.pop(name, None)
        ids = np.asarray(inputs.pop("input_ids"))[0].astype(np.int32)
        return {ENCODER_IDS: ids, **media_tensors(inputs, self._family)}


class ImageEncoderPrompts:
    """The image into the encoder; the decoder reads the question and writes the answer (Donut).

    A question that begins with a token of its own (`<s_cord-v2>`, `<s_docvqa>`) starts the decoder
    with it, as Donut's checkpoints are trained; any other follows the tokenizer's first token.
    Where `Family.decoder_start` names tokens, every question follows those.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self._processor, self._family = processor, family

    def training(self, messages: Messages, images: list[Image.Image], tools: Tools) -> Encoded:
        """Question and answer, labelled on the answer and the end token."""
        question, answer = question_and_answer(messages, tools, self._family)
        asked = self._question(question)
        tokenizer = self._processor.tokenizer
        ids = [*asked, *tokenizer(answer, add_special_tokens=False)["input_ids"]]
        ids.append(tokenizer.eos_token_id)
        span = (len(asked), len(ids))
        return Encoded(np.array(ids, dtype=np.int32), [span], self._pixels(images))

    def prompt(self, messages: Messages, images: list[Image.Image], tools: Tools) -> Encoded:
        """The question, for the decoder to go on from."""
        question, _ = question_and_answer(messages, tools, self._family)
        ids = np.array(self._question(question), dtype=np.int32)
        return Encoded(ids, [], self._pixels(images))

    def _question(self, question: str) -> list[int]:
        tokenizer = self._processor.tokenizer
        ids: list[int] = tokenizer(question, add_special_tokens=False)["input_ids"]
        if start := self._family.decoder_start:
            return [*(getattr(tokenizer, f"{name}_token_id") for name in start), *ids]
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return ids
        return [tokenizer.bos_token_id, *ids]

    def _pixels(self, images: list[Image.Image]) -> dict[str, np.ndarray]:
        _one_image(images, self._family)
        made = self._processor.image_processor(images, return_tensors="np", **_UNSCALED)
        return media_tensors(made, self._family)


def question_and_answer(messages: Messages, tools: Tools, family: Family) -> tuple[str, str]:
    """The texts of a conversation of one question and at most one answer.

    Raises
    ------
    SampleRefused
        If there are more turns, a system turn or tools: the model has no place for them.
    """
    if tools:
        raise SampleRefused(f"tools: {family.model_type} has no place for them")
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise SampleRefused(
            f"turns {', '.join(roles)}: {family.model_type} takes one question and one answer"
        )
    texts = [
        "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in messages
    ]
    return texts[0], texts[1] if len(texts) == 2 else ""


def _one_image(images: list[Image.Image], family: Family) -> None:
    if len(images) != 1:
        raise SampleRefused(f"{len(images)} images: {family.model_type} takes exactly one")
