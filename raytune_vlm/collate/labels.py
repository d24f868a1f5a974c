"""Which tokens are the assistant's: spans derived from the chat template, never guessed.

Where the template has a `{% generation %}` block, transformers marks the assistant's tokens.
Elsewhere the tokens that open an assistant turn and the one that ends it are found by rendering a
sentinel conversation; a template for which neither works is an error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from raytune_vlm.collate.encoded import Span
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import Family

_SENTINELS = ("qaz", "wsx", "edc", "rfv")


@dataclass(frozen=True)
class TurnMarkers:
    """Token ids around the assistant's text.

    Attributes
    ----------
    header
        What opens a turn.
    end
        The token that closes it.
    prefix
        What the generation prompt puts between header and answer, and rendered conversations do
        not have: Gemma 4's empty thinking channel.
    """

    header: tuple[int, ...]
    end: int
    prefix: tuple[int, ...] = ()


def spans_of_mask(mask: Sequence[int]) -> list[Span]:
    """Runs of ones in a 0/1 mask."""
    spans: list[Span] = []
    start: int | None = None
    for position, value in enumerate([*mask, 0]):
        if value and start is None:
            start = position
        elif not value and start is not None:
            spans.append((start, position))
            start = None
    return spans


def spans_of_markers(input_ids: Sequence[int], markers: TurnMarkers) -> list[Span]:
    """The assistant's spans, the end-of-turn token included, its header not."""
    header, size = markers.header, len(markers.header)
    ids = list(input_ids)
    spans: list[Span] = []
    position = 0
    while position + size <= len(ids):
        if tuple(ids[position : position + size]) != header:
            position += 1
            continue
        start = position + size
        if markers.end not in ids[start:]:
            break
        end = ids.index(markers.end, start) + 1
        spans.append((start, end))
        position = end
    return spans


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token, by id.

    `all_special_tokens` alone is not enough: since transformers 5 it leaves out tokens that were
    added as special without a name of their own, such as `<|im_start|>`.
    """
    added = tokenizer.added_tokens_decoder.items()
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**{number: token.content for number, token in added if token.special}, **dict(named)}


def structural_tokens(tokenizer: Any, family: Family) -> dict[int, str]:
    """The tokens that structure a sequence and are never part of a text, by id.

    All special tokens; where answers are made of added tokens (Donut's `<s_menu>`), those that
    begin, end and pad a sequence.
    """
    tokens = control_tokens(tokenizer)
    if family.prompt != "image-encoder":
        return {number: token for number, token in tokens.items() if token}
    names = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    named = {getattr(tokenizer, f"{name}_token", None) for name in names}
    return {number: token for number, token in tokens.items() if token in named}


def find_markers(processor: Any) -> TurnMarkers:
    """The markers of a chat template without a generation block.

    A conversation of four sentinel turns is rendered; what stands between a user's and an
    assistant's sentinel ends with the assistant's header, and the first special token after the
    assistant's sentinel ends the turn. What a generation prompt has beyond that is the prefix of
    the model's answers. The markers are accepted only if scanning the rendered
    conversation with them gives back exactly the assistant's sentinels.

    Raises
    ------
    ModelError
        If the template has no special token after the assistant's text, or the check fails.
    """
    user_1, answer_1, user_2, answer_2 = _SENTINELS
    conversation = [
        _text_turn("user", user_1),
        _text_turn("assistant", answer_1),
        _text_turn("user", user_2),
        _text_turn("assistant", answer_2),
    ]
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template(conversation, tokenize=False)
    prompt = processor.apply_chat_template(
        conversation[:3], tokenize=False, add_generation_prompt=True
    )
    name = type(processor).__name__
    shared = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False))
    )
    opened, prefix_text = prompt[:shared], prompt[shared:]
    if not text[len(opened) :].lstrip().startswith(answer_2):
        raise ModelError(f"the chat template of {name} changes earlier turns when one is added")
    header_text = opened.rsplit(user_2, 1)[1]
    between = text.split(user_1, 1)[1].split(answer_1, 1)[0]
    if not header_text.endswith(between[-1:]) or not between:
        raise ModelError(f"the chat template of {name} opens assistant turns in two ways")
    special = control_tokens(tokenizer)
    header_ids = tokenizer(header_text, add_special_tokens=False)["input_ids"]
    begins = [place for place, token in enumerate(header_ids) if token in special]
    tail = tokenizer(text.rsplit(answer_2, 1)[1], add_special_tokens=False)["input_ids"]
    ends = [token for token in tail if token in special]
    if not begins or not ends:
        raise ModelError(
            f"the chat template of {name} marks assistant turns with no special token; "
            "add a {% generation %} block to it"
        )
    prefix = tokenizer(prefix_text, add_special_tokens=False)["input_ids"] if prefix_text else []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # The shortest header that tells the assistant's turns from the user's.
    for begin in reversed(begins):
        markers = TurnMarkers(tuple(header_ids[begin:]), ends[0], tuple(prefix))
        found = [
            tokenizer.decode(ids[start : end - 1]).strip()
            for start, end in spans_of_markers(ids, markers)
        ]
        if found == [answer_1, answer_2]:
            return markers
    raise ModelError(
        f"the chat template of {name} does not let the assistant's turns be found "
        f"(expected {[answer_1, answer_2]}, scanned {found}); add a generation block to it"
    )


def _text_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
