"""`dotted.key=value` on the command line: values are YAML, list items go by their index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.schema import subschema
from raytune_vlm.config.secrets import hides_secret, secret_problems
from raytune_vlm.config.section import Section
from raytune_vlm.config.yaml_lines import read_yaml
from raytune_vlm.errors import ConfigError
from raytune_vlm.visible import one_line

SEARCH_SPACE = "sweep.search_space"
"""The one mapping whose keys contain dots themselves."""


def apply_overrides(
    plain: dict[str, Any],
    overrides: Sequence[str],
    origins: dict[str, str],
    model: type[Section] = ExperimentConfig,
) -> None:
    """Change a file of `model` as read, and where each of its dotted keys comes from, in place.

    A changed `type` replaces its whole mapping, so those overrides go first, whatever their order.

    Raises
    ------
    ConfigError
        If an override has no `=`, is given twice, holds a secret, or has nowhere to go.
    """
    parsed = [parse_override(text) for text in overrides]
    names = [key for key, _, _ in parsed]
    for key, _, name in parsed:
        if names.count(key) > 1:
            raise ConfigError(f"{name}: {key} is given twice")
    for key, value, name in sorted(parsed, key=lambda item: not item[0].endswith(".type")):
        replaced = _set(plain, key, value, name, model)
        for known in [known for known in origins if known.startswith(f"{replaced}.")]:
            del origins[known]
        origins[replaced] = name
        while replaced := replaced.rpartition(".")[0]:
            origins.setdefault(replaced, name)


def parse_override(text: str) -> tuple[str, Any, str]:
    """The key, the value and the name in errors of `dotted.key=value`, the value read as YAML.

    Raises
    ------
    ConfigError
        If it is none, or looks like a secret.
    """
    key, equals, raw = text.partition("=")
    if hides_secret(text):
        raise ConfigError(f"override {key if equals else '...'}: {_SECRET}")
    name = one_line(f"override {text}")
    if not equals:
        raise ConfigError(f"{name}: must be dotted.key=value")
    if not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
        raise ConfigError(f"{name}: {key!r} is not a dotted key")
    try:
        value, _ = read_yaml(raw, "")
    except ConfigError as error:
        raise ConfigError(f"{name}: {re.sub(r'^:[0-9]+: ', '', error.message)}") from None
    if any(secret_problems(dict.fromkeys(key.split(".")))) or any(secret_problems(value)):
        raise ConfigError(f"override {key}: {_SECRET}")
    return key, value, name


def _set(plain: dict[str, Any], key: str, value: Any, name: str, model: type[Section]) -> str:
    """Set one key; the dotted key of what was replaced."""
    node: Any = plain
    path: list[str] = []
    steps = _steps(plain, key)
    for step in steps[:-1]:
        path.append(step)
        if isinstance(node, dict):
            if node.get(step) is None:
                node[step] = _new_mapping(".".join(path), plain, name, model)
            node = node[step]
        else:
            node = node[_index(node, step, path, name)]
    leaf = steps[-1]
    if isinstance(node, list):
        node[_index(node, leaf, [*path, leaf], name)] = value
    elif not isinstance(node, dict):
        raise ConfigError(f"{name}: {'.'.join(path)} is {node!r:.60}, not a mapping of keys")
    elif leaf == "type" and path and node.get("type") != value:
        node.clear()
        node["type"] = value
        return ".".join(path)
    else:
        node[leaf] = value
    return key


def _steps(plain: dict[str, Any], key: str) -> list[str]:
    if not key.startswith(f"{SEARCH_SPACE}."):
        return key.split(".")
    rest = key.removeprefix(f"{SEARCH_SPACE}.")
    space = (plain.get("sweep") or {}).get("search_space") or {}
    for known in sorted(space, key=len, reverse=True):
        if rest.startswith(f"{known}."):
            inside = rest.removeprefix(f"{known}.")
            condition, _, name = inside.partition(".")
            steps = [condition, name] if condition == "when" and name else inside.split(".")
            return ["sweep", "search_space", known, *steps]
    return ["sweep", "search_space", rest]


def _new_mapping(
    dotted: str, plain: dict[str, Any], name: str, model: type[Section]
) -> dict[str, Any]:
    """What a mapping that the file does not mention starts as: the type of its default, if any."""
    schema = subschema(dotted, plain, model)
    if schema.get("type") == "array":
        raise ConfigError(f"{name}: {dotted} is a list that the file does not set; give it whole")
    default = schema.get("default")
    return {"type": default["type"]} if isinstance(default, dict) and "type" in default else {}


def _index(node: Any, step: str, path: list[str], name: str) -> int:
    parent = ".".join(path[:-1])
    if not isinstance(node, list):
        raise ConfigError(f"{name}: {parent} is {node!r:.60}, not a mapping of keys")
    if not step.isdigit() or int(step) >= len(node):
        raise ConfigError(
            f"{name}: {parent} is a list of {len(node)} (0 to {len(node) - 1}), got {step!r}"
        )
    return int(step)


_SECRET = "looks like a secret; use an environment variable (HF_TOKEN for the hub)"
