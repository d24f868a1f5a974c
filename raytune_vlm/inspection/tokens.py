"""A sample's token stream as pieces of text: what carries loss, what is special, what is image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raytune_vlm.collate.arrays import ENCODER_IDS
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.labels import control_tokens
from raytune_vlm.inspection.text import TIMES
from raytune_vlm.visible import visible

if TYPE_CHECKING:
    from raytune_vlm.collate.encoded import Encoded

Kind = Literal["text", "special", "image"]


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, decoded; nothing in the text is raw."""

    text: str
    kind: Kind
    labelled: bool
    num_tokens: int


def image_token_id(processor: Any) -> int | None:
    """The id of the token that stands for a part of an image; None where there is none.

    The tokenizer goes first: what Gemma 3's processor names so is what stands in the template.
    """
    for holder in (processor.tokenizer, processor):
        number = getattr(holder, "image_token_id", None)
        if isinstance(number, int):
            return number
    token = getattr(processor, "image_token", None)
    return None if token is None else int(processor.tokenizer.convert_tokens_to_ids(str(token)))


def count_image_tokens(encoded: Encoded, processor: Any) -> int:
    """How many tokens of a sample are image."""
    number = image_token_id(processor)
    if number is None:
        return 0
    read = encoded.tensors.get(ENCODER_IDS, encoded.input_ids)
    return int((read == number).sum())


def pieces_of(encoded: Encoded, processor: Any) -> list[Piece]:
    """The whole token stream, decoded; a run of image tokens is one piece, `<image>×169`.

    What a text encoder reads (Florence-2) comes first, an arrow ahead of what the decoder does.
    """
    if ENCODER_IDS in encoded.tensors:
        read = pieces_of(Encoded(encoded.tensors[ENCODER_IDS], []), processor)
        own = pieces_of(Encoded(encoded.input_ids, encoded.spans), processor)
        return [*read, Piece(" → ", "text", False, 0), *own]
    ids = encoded.input_ids.tolist()
    tokenizer = processor.tokenizer
    special, image = control_tokens(tokenizer), image_token_id(processor)
    labelled = np.zeros(len(ids), dtype=bool)
    for start, end in encoded.spans:
        labelled[start:end] = True
    pieces: list[Piece] = []
    start = 0
    while start < len(ids):
        kind = _kind(ids[start], special, image)
        end = start + 1
        while end < len(ids) and labelled[end] == labelled[start]:
            same = ids[end] == ids[start] if kind == "special" else True
            if not same or _kind(ids[end], special, image) != kind:
                break
            end += 1
        if kind == "text":
            text = _between(tokenizer, ids, start, end)
        else:
            text = special.get(ids[start]) or str(tokenizer.convert_ids_to_tokens(ids[start]))
            text += f"{TIMES}{end - start}" if end - start > 1 or kind == "image" else ""
        pieces.append(Piece(visible(text), kind, bool(labelled[start]), end - start))
        start = end
    return pieces


def _kind(number: int, special: dict[int, str], image: int | None) -> Kind:
    if number == image:
        return "image"
    return "special" if number in special else "text"


def _between(tokenizer: Any, ids: list[int], start: int, end: int) -> str:
    """The text of `ids[start:end]` in its place: alone, sentencepiece drops its first space."""
    if start:
        before = _decode(tokenizer, ids[start - 1 : start])
        whole = _decode(tokenizer, ids[start - 1 : end])
        if whole.startswith(before):
            return whole[len(before) :]
    return _decode(tokenizer, ids[start:end])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
