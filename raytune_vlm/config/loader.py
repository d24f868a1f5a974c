"""Read an experiment file, apply `dotted.key=value` overrides, and fail with every problem at once.

A problem is one line that names file and line, or the override, then the dotted key, what is wrong
and the nearest valid name:

    experiments/x.yaml:12: train.lerning_rate: unknown key (did you mean 'learning_rate'?)
    override train.batch_size=0: Input should be greater than or equal to 1, got 0
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.overrides import SEARCH_SPACE, apply_overrides
from raytune_vlm.config.reference import in_words
from raytune_vlm.config.schema import subschema
from raytune_vlm.config.search_space import point_problems, search_space_problems
from raytune_vlm.config.secrets import secret_problems
from raytune_vlm.config.section import Section
from raytune_vlm.config.yaml_lines import read_yaml, write_yaml
from raytune_vlm.errors import ConfigError, did_you_mean

AnySection = TypeVar("AnySection", bound=Section)

_MISSING = "this key is required and missing"

_CODE_KEY = re.compile("trust|remote_?code|code_revision|auto_map")
"""Keys by which somebody might try to let a model's own code run."""


def load_experiment(file: Path | str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The resolved, validated experiment.

    Raises
    ------
    ConfigError
        If anything is wrong with the file, an override or the search space; one line a problem.
    """
    plain, origins = read_plain(file, "an experiment needs at least name and data")
    return resolve(plain, overrides, origins, str(file))


def read_plain(file: Path | str, needed: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file of keys, and where each of its dotted keys stands.

    Raises
    ------
    ConfigError
        If it cannot be read, is empty (`needed` says what is wanted), or holds a secret.
    """
    plain, lines = read_yaml(_text_of(Path(file), str(file)), str(file))
    if plain is None:
        raise ConfigError(f"{file}: is empty; {needed}")
    if not isinstance(plain, dict):
        kind = "a list" if isinstance(plain, list) else "a single value"
        raise ConfigError(f"{file}: the top level must be a mapping of keys, got {kind}")
    origins = {key: f"{file}:{line}" for key, line in lines.items()}
    _refuse(f"{origins.get(key, file)}: {why}" for key, why in secret_problems(plain))
    return plain, origins


def resolve(
    plain: dict[str, Any],
    overrides: Sequence[str] = (),
    origins: dict[str, str] | None = None,
    name: str = "experiment",
) -> ExperimentConfig:
    """Plain data with overrides as a validated experiment; both mappings are changed in place.

    Parameters
    ----------
    origins
        Dotted key -> where it stands, for messages; others are said to stand in `name`.

    Raises
    ------
    ConfigError
        If anything is wrong with the data, an override or the search space; one line a problem.
    """
    origins = {} if origins is None else origins
    apply_overrides(plain, overrides, origins)
    origins[""] = name
    experiment = validated(ExperimentConfig, plain, origins)
    problems = list(_said_twice(plain))
    for key, why in search_space_problems(experiment):
        problems.append((f"{SEARCH_SPACE}.{key}" if key else SEARCH_SPACE, why))
    if len(problems) == 0:
        problems += point_problems(experiment)
    _refuse(_line(key, why, origins) for key, why in problems)
    return experiment


def validated(
    model: type[AnySection], plain: dict[str, Any], origins: dict[str, str]
) -> AnySection:
    """Plain data as a section; raises ConfigError, one line a problem, each with its origin."""
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        found = [_problem(dict(details), plain, model) for details in error.errors()]
        told = _without_misspelt([*filter(None, found)])
        _refuse(_line(key, why, origins) for key, why in told)
        raise  # never reached: a ValidationError has at least one problem


def render(experiment: ExperimentConfig) -> str:
    """The resolved experiment as YAML, which `load_experiment` reads back as the same."""
    plain = experiment.model_dump(mode="json")
    if experiment.lora.alpha is not None:
        del plain["lora"]["alpha_ratio"]
    if experiment.train.epochs is not None:
        del plain["train"]["max_steps"]
    if experiment.train.warmup_share is not None:
        del plain["train"]["warmup_steps"]
    return write_yaml(plain)


def _text_of(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        here = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"{name}: no such file{did_you_mean(path.name, here)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        reason = "is a folder, not an experiment file" if path.is_dir() else error.strerror
        raise ConfigError(f"{name}: {reason}") from None


def _refuse(problems: Iterator[str]) -> None:
    if found := dict.fromkeys(problems):
        raise ConfigError(*found)


def _said_twice(plain: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    lora = plain.get("lora") or {}
    if lora.get("alpha") is not None and "alpha_ratio" in lora:
        why = "is not used when alpha is set; give one of the two"
        yield "lora.alpha_ratio", why
    train = plain.get("train") or {}
    for own, other in (("epochs", "max_steps"), ("warmup_share", "warmup_steps")):
        if train.get(own) is not None and other in train:
            yield f"train.{other}", f"is not used when {own} is set; give one of the two"


def _line(key: str, why: str, origins: Mapping[str, str]) -> str:
    """`origin: key: why`, where the origin is the most telling one: an override, or a line."""
    words = re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)*", why)
    named = [f"{key}.{word}".removeprefix(".") for word in words] if " " in why else []
    named = [name for name in named if name in origins]
    overridden = [name for name in named if origins[name].startswith("override ")]
    if key.startswith(f"{SEARCH_SPACE}."):
        overridden += [name for name in origins if name.startswith(f"{key}.")]
        overridden = [name for name in overridden if origins[name].startswith("override ")]
    place = next(iter(overridden or named), key)
    while place not in origins:
        place = place.rpartition(".")[0]
    origin = origins[place]
    if not key or origin.startswith(f"override {key}="):
        return f"{origin}: {why}"
    return f"{origin}: {key}: {why}"


def _without_misspelt(problems: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without required keys that are missing because their name is misspelt, which is told."""
    meant = {
        f"{key.rpartition('.')[0]}.{near[1]}".removeprefix(".")
        for key, why in problems
        if (near := re.fullmatch(r"unknown key \(did you mean '(.+)'\?\)", why))
    }
    return [(key, why) for key, why in problems if why != _MISSING or key not in meant]


def _problem(
    details: Mapping[str, Any], plain: Any, model: type[Section]
) -> tuple[str, str] | None:
    """A pydantic error as (dotted key, message); None for the mere echo of another one."""
    key, value, wanted = _dotted(details, plain, model)
    kind, got = details["type"], f"{value!r}"
    got = got if len(got) <= 80 else f"{got[:77]}..."
    if wanted:
        return key, f"Input should be {wanted}, got {got}"
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
        parent, _, name = key.rpartition(".")
        if _CODE_KEY.search(name):
            return key, (
                "whether code of a model runs is never read from a file or an override; give "
                "--trust-remote-code MODEL@REVISION on the command line"
            )
        siblings = subschema(parent, plain, model).get("properties", {})
        return key, f"unknown key{did_you_mean(name, siblings)}"
    if kind == "missing":
        return key, _MISSING
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        hint = did_you_mean(context["tag"], tags)
        known = f"; known: {', '.join(tags)}" if "did you mean" in hint else ""
        return f"{key}.type", f"unknown type {context['tag']!r}{hint}{known}"
    if kind == "union_tag_not_found":
        tags = subschema(key, plain, model).get("tags", [])
        return key, f"type is missing; known: {', '.join(tags)}"
    if kind == "too_short":
        return None if details["input"] else (key, "Input should have at least one item, got none")
    if kind == "value_error":
        return key, str(context["error"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return key, f"Input should be a mapping of keys, got {got}"
    if kind in ("tuple_type", "list_type"):
        return key, f"Input should be a list, got {got}"
    why = f"{details['msg']}, got {got}"
    if kind == "literal_error" and isinstance(details["input"], str):
        hint = did_you_mean(details["input"], re.findall(r"'([^']*)'", context["expected"]))
        why += hint if "did you mean" in hint else ""
    return key, why


def _dotted(details: Mapping[str, Any], whole: Any, model: type[Section]) -> tuple[str, Any, str]:
    """The place of a pydantic error as a dotted key without union tags, the value there, and what
    is wanted in its place where that may be of several kinds, each with an error of its own."""
    keys: list[str] = []
    plain, untagged = whole, True
    for step in details["loc"]:
        node = subschema(".".join(keys), whole, model)
        if "anyOf" in node:
            return ".".join(keys), plain, _wanted(node)
        if isinstance(plain, dict):
            if untagged and step == plain.get("type") and "type" in plain:
                untagged = False
                continue
            plain = plain.get(step)
        elif isinstance(plain, list) and isinstance(step, int):
            plain = plain[step] if step < len(plain) else None
        untagged = True
        keys.append(str(step))
    return ".".join(keys), details["input"], ""


def _wanted(node: dict[str, Any]) -> str:
    """What a value of several kinds may be."""
    kinds = {entry.get("type") for entry in node["anyOf"]}
    if kinds >= {"boolean", "number", "string"}:
        return "a number, a text, true or false" + (", or a list" if "array" in kinds else "")
    return in_words(node).replace("`", "'")
