"""Text of others in few characters."""

from __future__ import annotations

from raytune_vlm.visible import visible

TIMES = "\u00d7"
"""Between height and width, and before the length of a run."""


def line(text: object, length: int = 300) -> str:
    """A value as one visible line that is never long."""
    whole = visible(" ".join(str(text).split()))
    return whole if len(whole) <= length else f"{whole[: length - 1]}…"


def middle_out(text: str, length: int) -> str:
    """The text with its middle left out, and how much, where it is longer than `length`."""
    if len(text) <= length:
        return text
    head, tail = length * 3 // 4, length // 4
    left_out = len(text) - head - tail
    return f"{text[:head]} […{left_out:,} characters left out…] {text[len(text) - tail :]}"
