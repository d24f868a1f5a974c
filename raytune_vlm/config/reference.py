"""The reference of experiment files in Markdown, from the docstrings of the config models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from raytune_vlm.config.schema import json_schema

_DEFS = "#/$defs/"

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}

_HEAD = """# Every key of an experiment

Made by `raytune-vlm schema --markdown` from the config's docstrings. A dotted key is what an
override on the command line and `sweep.search_space` take: `train.learning_rate=2e-4`. What has no
default has to be given, but for sections, whose own keys have theirs.
"""


def markdown() -> str:
    """A section for the experiment and for each of its parts, in the order in which they appear."""
    schema = json_schema()
    parts = "\n".join(_sections(schema, schema["$defs"], "", set()))
    return f"{_HEAD}\n{parts}"


def _sections(
    node: dict[str, Any], defs: dict[str, Any], path: str, seen: set[str]
) -> Iterator[str]:
    kind = node["properties"].get("type", {}).get("const")
    title = f"`{path}`" if path else "The experiment"
    yield f"## {title}{f', `type: {kind}`' if kind else ''}\n"
    if node.get("description"):
        yield f"{_line(node['description'])}\n"
    keys = {name: each for name, each in node["properties"].items() if name != "type" or not kind}
    if keys:
        yield "| key | value | default | |\n|---|---|---|---|"
        required = node.get("required", ())
        for name, each in keys.items():
            default = "" if name in required else _default(each)
            text = _line(_described(each, defs)).replace("|", "\\|")
            yield f"| `{name}` | {in_words(each)} | {default} | {text} |"
        yield ""
    for name, each in keys.items():
        for reference, place in _references(each, f"{path}.{name}" if path else name):
            if reference not in seen:
                seen.add(reference)
                yield from _sections(defs[reference], defs, place, seen)


def _described(node: dict[str, Any], defs: dict[str, Any]) -> str:
    """What a key is for; of a section what the section is."""
    own = (
        node
        if "description" in node or "$ref" not in node
        else defs[node["$ref"].removeprefix(_DEFS)]
    )
    return str(own.get("description", ""))


def _references(node: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """The models that a value may be, and the key under which they stand."""
    if "$ref" in node:
        yield node["$ref"].removeprefix(_DEFS), path
    for each in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _references(each, path)
    if "items" in node:
        yield from _references(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from _references(node["additionalProperties"], f"{path}.KEY")


def in_words(node: dict[str, Any]) -> str:
    """What may be given for a node of the schema."""
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(in_words(each) for each in node["anyOf"]))
    if "discriminator" in node:
        return "type: " + ", ".join(f"`{name}`" for name in node["discriminator"]["mapping"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if "$ref" in node:
        return "a section"
    kind = node.get("type", "anything")
    if kind == "array":
        inner = node.get("items") or {}
        return f"list of: {in_words(inner)}" if inner else "list"
    if kind == "object":
        return "mapping"
    bounds = [f"{word} {node[name]:g}" for name, word in _BOUNDS.items() if name in node]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _default(node: dict[str, Any]) -> str:
    default = node.get("default")
    if isinstance(default, dict):
        return f"`type: {default['type']}`" if "type" in default else ""
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def _line(text: str) -> str:
    return " ".join(text.split())
