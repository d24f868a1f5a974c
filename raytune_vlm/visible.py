"""Text of others made safe to show: nothing in it may steer a terminal or forge a line of a log."""

from __future__ import annotations

import re

import click

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: ESC among them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction: they reorder what is read
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # separators, marks, invisible tags
    "\ud800-\udfff]"  # halves of pairs: bytes of file names that are not UTF-8
)


def visible(text: str) -> str:
    """The text with control, direction and invisible characters as marks; newlines stay.

    `ESC` becomes `␛`, as Unicode pictures it; what has no picture becomes its number, `\\u202e`.
    """
    return _HIDDEN.sub(lambda match: _mark(match[0]), text)


def one_line(text: str) -> str:
    """The same in one line: line breaks and tabs become blanks."""
    return visible(text).replace("\n", " ").replace("\t", " ")


def tell(text: str) -> None:
    """Print a text that may hold words of others."""
    click.echo(visible(text))


def _mark(character: str) -> str:
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
