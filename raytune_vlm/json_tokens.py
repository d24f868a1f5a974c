"""JSON as a flat sequence of tags, the target format of document parsing, and back.

`{"menu": [{"nm": "TEA"}, {"nm": "BUN"}]}` is written
`<s_menu><s_nm>TEA</s_nm><sep/><s_nm>BUN</s_nm></s_menu>`.

The format is Donut's (Kim et al. 2022, "OCR-free Document Understanding Transformer";
clovaai/donut, `donut/model.py`, `json2token` and `token2json`). Two rules differ from that file,
both on purpose: values may hold newlines (the original pattern drops them), and keys keep the
order of the document unless `sort_keys` is set.
"""

from __future__ import annotations

import re
from typing import Any

SEPARATOR = "<sep/>"
MAX_DEPTH = 64
"""Deeper nesting is read as plain text: a model stuck in a loop writes such things."""

_OPEN = re.compile(r"<s_(.*?)>", re.DOTALL)


def json2token(value: Any, *, sort_keys: bool = False) -> str:
    """The tags of a JSON value: dicts become tag pairs, lists are joined by `<sep/>`."""
    if isinstance(value, dict):
        keys = sorted(value, reverse=True) if sort_keys else list(value)
        return "".join(
            f"<s_{key}>{json2token(value[key], sort_keys=sort_keys)}</s_{key}>" for key in keys
        )
    if isinstance(value, list):
        return SEPARATOR.join(json2token(item, sort_keys=sort_keys) for item in value)
    return str(value)


def tags_of(value: Any) -> set[str]:
    """Every tag that `json2token` writes for this value (without `<sep/>`)."""
    return set(re.findall(r"</?s_[^<>]*?>", json2token(value)))


def token2json(text: str) -> Any:
    """The JSON value that a sequence of tags says; never raises.

    A tag that is never closed is skipped together with its name, as in Donut. Text outside all
    tags in a sequence that has tags is dropped. A sequence without any tag gives
    `{"text_sequence": text}`; an empty one gives `{}`.
    """
    parsed = _parse(text, inner=False)
    if parsed:
        return parsed
    return {"text_sequence": text.strip()} if text.strip() else {}


def is_parsable(text: str) -> bool:
    """Whether the text has at least one complete tag pair."""
    match = _OPEN.search(text)
    while match:
        if f"</s_{match.group(1)}>" in text[match.end() :]:
            return True
        match = _OPEN.search(text, match.end())
    return False


def _parse(text: str, *, inner: bool, depth: int = 0) -> Any:
    """The items that `<sep/>` joins at this level; a single one stands for itself outside."""
    items: list[dict[str, Any]] = []
    output: dict[str, Any] = {}
    while match := _OPEN.search(text):
        key = match.group(1)
        end = text.find(f"</s_{key}>", match.end())
        if end < 0:
            text = text[: match.start()] + text[match.end() :]
            continue
        content = text[match.end() : end].strip()
        if "<s_" in content and "</s_" in content and depth < MAX_DEPTH:
            value = _parse(content, inner=True, depth=depth + 1)
            if value:
                output[key] = value[0] if len(value) == 1 else value
        else:
            leaves = [leaf.strip() for leaf in content.split(SEPARATOR)]
            output[key] = leaves[0] if len(leaves) == 1 else leaves
        text = text[end + len(f"</s_{key}>") :].strip()
        if text.startswith(SEPARATOR):
            text = text[len(SEPARATOR) :].strip()
            items.append(output)
            output = {}
    if items:
        return [*items, output] if output else items
    if inner:
        return [output] if output else []
    return output
