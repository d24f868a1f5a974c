"""The JSON schema of an experiment file: for editors, for `raytune-vlm schema`, for did-you-mean.

An experiment that starts with `# yaml-language-server: $schema=schema.json` is completed and
checked while it is written. Descriptions are the docstrings of the config models.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.search_space import searchable_keys
from raytune_vlm.config.section import Section


def json_schema() -> dict[str, Any]:
    """The schema as plain data (a new copy each time)."""
    schema = ExperimentConfig.model_json_schema()
    search_space = schema["$defs"]["SweepConfig"]["properties"]["search_space"]
    search_space["propertyNames"] = {"enum": searchable_keys()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The schema as `experiments/schema.json` holds it."""
    return json.dumps(json_schema(), indent=2) + "\n"


def subschema(dotted: str, data: Any, model: type[Section] = ExperimentConfig) -> dict[str, Any]:
    """The schema of what lies under a dotted key; `{}` where there is none.

    `data` is the file of `model` as read: its `type` keys decide which variant of a union is meant.
    """
    whole = _schema(model)
    node = _follow(whole, data, whole)
    rest = dotted.split(".") if dotted else []
    while rest:
        if "properties" in node:
            key, rest = rest[0], rest[1:]
            node = node["properties"].get(key, {})
        elif "items" in node:
            key, rest = rest[0], rest[1:]
            node = node["items"]
        elif isinstance(node.get("additionalProperties"), dict):
            key, rest = _entry_of(data, rest)
            node = node["additionalProperties"]
        else:
            return {}
        data = _item(data, key)
        node = _follow(node, data, whole)
    return node


def _entry_of(data: Any, rest: list[str]) -> tuple[str, list[str]]:
    """Split the rest of a dotted path after a key that contains dots itself."""
    for end in range(len(rest), 0, -1):
        key = ".".join(rest[:end])
        if isinstance(data, dict) and key in data:
            return key, rest[end:]
    return ".".join(rest), []


def _item(data: Any, key: str) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    if isinstance(data, list) and key.isdigit() and int(key) < len(data):
        return data[int(key)]
    return None


def _follow(node: dict[str, Any], data: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """Resolve references, and unions by their tag; a default stays known under `default`."""
    default = {"default": node["default"]} if "default" in node else {}
    given = [entry for entry in node.get("anyOf", ()) if entry.get("type") != "null"]
    if len(given) == 1:  # something, or null
        node = given[0]
    if "discriminator" in node:
        tag = data.get("type") if isinstance(data, dict) else None
        mapping = node["discriminator"]["mapping"]
        if not isinstance(tag, str) or tag not in mapping:
            return {**default, "tags": sorted(mapping)}
        node = {"$ref": mapping[tag]}
    if "$ref" in node:
        node = whole["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return {**node, **default}


@functools.cache
def _schema(model: type[Section]) -> dict[str, Any]:
    return json_schema() if model is ExperimentConfig else model.model_json_schema()
