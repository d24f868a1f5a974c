"""YAML that keeps its line numbers and says what is wrong with it in one line.

Read as people expect (YAML 1.2's core): `1e-4` is a number, `010`, `on` and `2026-01-31` are text.
Refused: duplicate keys, tags, anchors and aliases, tabs as indentation, more than one document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from raytune_vlm.errors import ConfigError

_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))"
    r"([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_WORDS = {
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
}
_MAX_NUMBER = 100
"""Characters of a number; Python refuses integers of some thousands of them."""
_HALF = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers above and no aliases."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not allowed", mark
            )
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if event.tag is not None:
            raise yaml.composer.ComposerError(
                None, None, f"tag {event.tag!r} is not allowed", event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes what our loader would read as a number."""


for _tag, _pattern in (_NUMBERS | _WORDS).items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)
for _tag, _pattern in _NUMBERS.items():
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)


def read_yaml(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """The data of one YAML document, and the line of every dotted key and list item in it.

    Raises
    ------
    ConfigError
        If it is not YAML or uses what is refused; the message starts with `name:line:`.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[str, int] = {}
            return (None if node is None else _read(loader, node, "", lines, name)), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: {_explain(error, text, line)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{name}:{line}: character {chr(error.character)!r} is not allowed in YAML"
        ) from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None


def write_yaml(data: Any) -> str:
    """YAML in the order of the keys, which `read_yaml` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read(loader: _Loader, node: yaml.Node, path: str, lines: dict[str, int], name: str) -> Any:
    if path:
        lines.setdefault(path, node.start_mark.line + 1)
    prefix = f"{path}." if path else ""
    if isinstance(node, yaml.SequenceNode):
        return [
            _read(loader, item, f"{prefix}{i}", lines, name) for i, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        return dict(_read_items(loader, node, prefix, lines, name))
    where = f"{name}:{node.start_mark.line + 1}: {path}"
    if node.tag in _NUMBERS and len(node.value) > _MAX_NUMBER:
        raise ConfigError(f"{where}: a number of {len(node.value)} characters")
    if _HALF.search(node.value):
        raise ConfigError(f"{where}: half of a surrogate pair: not valid Unicode")
    return loader.construct_object(node)


def _read_items(
    loader: _Loader, node: yaml.MappingNode, prefix: str, lines: dict[str, int], name: str
) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{name}:{line}: a key must be text, not a list or a mapping")
        key = key_node.value
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{name}:{line}: key {key!r} must be text; put it in quotes")
        if _HALF.search(key):
            raise ConfigError(f"{name}:{line}: key {key!r}: half of a surrogate pair")
        if key in seen:
            raise ConfigError(
                f"{name}:{line}: {prefix}{key}: duplicate key, first given in line {seen[key]}"
            )
        seen[key] = line
        lines[f"{prefix}{key}"] = line
        yield key, _read(loader, value_node, f"{prefix}{key}", lines, name)


def _explain(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    rows = text.splitlines()
    indentation = re.match(r"\s*", rows[line - 1] if line <= len(rows) else "")
    if indentation and "\t" in indentation.group():
        return "tab in the indentation; YAML wants spaces"
    problem = " ".join((error.problem or "cannot be read").split())
    parts = [error.context, problem] if problem.startswith("but ") else [problem, error.context]
    return f"not valid YAML: {' '.join(part for part in parts if part)}"
