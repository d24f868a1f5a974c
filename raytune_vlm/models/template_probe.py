"""Renders a chat template in a process of its own, with little time and memory; a script.

    python -P template_probe.py SECONDS BYTES < TEMPLATE

A sandbox keeps a template from reaching Python's objects, not from loops without end or texts
without bound. Prints why the template is refused, or nothing; what else it raises is said when real
conversations are encoded. The environment is that of transformers (`utils/chat_template_utils.py`).
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 1 << 20
"""Of the rendered text; the conversations below have a few thousand."""

_TEXT = "What does it say? " * 100
_PARTS = [{"type": "image"}, {"type": "text", "text": _TEXT}]
_TURNS = [("user", _PARTS), ("assistant", [{"type": "text", "text": _TEXT}])]
_TOOL = {"type": "function", "function": {"name": "f", "description": _TEXT, "parameters": {}}}


class _Generation(Extension):
    """`{% generation %}` renders what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        found: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return found


def _conversations() -> list[dict[str, Any]]:
    """Values of the template's variables: parts, plain texts, tools; open and closed."""
    parts = [{"role": role, "content": content} for role, content in _TURNS * 2]
    texts = [{"role": role, "content": _TEXT} for role, _ in _TURNS * 2]
    system = {"role": "system", "content": _TEXT}
    return [
        {"messages": parts, "tools": None, "add_generation_prompt": False},
        {"messages": [system, *texts], "tools": None, "add_generation_prompt": True},
        {"messages": texts, "tools": [_TOOL], "add_generation_prompt": True},
    ]


def _raise(message: str) -> None:
    raise TemplateError(message)


def refusal(template: str) -> str:
    """Why a template is refused; empty for one that is not."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: form}
    for values in _conversations():
        length = 0
        try:
            for piece in environment.from_string(template).generate(**values):
                length += len(piece)
                if length > MAX_CHARACTERS:
                    return f"it makes more than {MAX_CHARACTERS} characters of a short conversation"
        except SecurityError as error:
            return f"it reaches for what a template may not have: {error}"
        except (MemoryError, OverflowError) as error:
            return f"it counts or repeats beyond all bounds: {str(error) or type(error).__name__}"
        except Exception:  # not a matter of safety; see the top of this file
            continue
    return ""


if __name__ == "__main__":
    seconds, size = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    sys.stdout.write(refusal(sys.stdin.read()))
