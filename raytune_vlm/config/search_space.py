"""Is a search space one that trials can run? Asked when the experiment is read, not on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from pydantic import BaseModel, ValidationError

from raytune_vlm.config.distributions import Space, active_keys, branches
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.sweep import flatten
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ConfigError, did_you_mean

SHARED_TRAIN_KEYS = (
    "train.max_steps",
    "train.epochs",
    "train.backend",
    "train.fsdp2.shard_size",
    "train.fsdp2.compute_dtype",
    "train.deepspeed.stage",
    "train.deepspeed.offload_optimizer",
    "train.distillation.teacher",
    "train.distillation.revision",
    "train.distillation.adapter",
    "train.num_workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
)
"""What all trials of a sweep share, because one resident executor trains them one after another."""


def searchable_keys() -> list[str]:
    """The dotted keys that a trial may vary."""
    keys = [*_leaves(LoraConfig, "lora"), *_leaves(TrainConfig, "train")]
    return [key for key in keys if key not in SHARED_TRAIN_KEYS]


def _leaves(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


def search_space_problems(experiment: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """What is wrong with the search space, as (dotted key of the search space or "", message).

    Every end point and every listed value has to be valid for the whole experiment: alone, with
    every one of any other key, and all lower (upper) ends together; where keys have conditions, in
    each way in which these may turn out.
    """
    space = experiment.sweep.search_space
    known = flatten(experiment.model_dump())
    refused = [(key, _refusal(key, known)) for key in space if key not in searchable_keys()]
    yield from refused
    if refused:
        return
    for recipe, keys in branches(space):
        found = list(_branch_problems(experiment, recipe, keys))
        yield from found
        if found:
            return


def _branch_problems(
    experiment: ExperimentConfig, given: dict[str, Any], keys: list[str]
) -> Iterator[tuple[str, str]]:
    """The same where the keys that conditions name have the given values."""
    corners = {key: experiment.sweep.search_space[key].corners() for key in keys}
    corners.update({key: [value] for key, value in given.items()})
    found = False
    for key in keys:
        reasons = (_invalid(experiment, key, value, given) for value in corners[key])
        for found_reason in list(filter(None, reasons))[:1]:
            found = True
            yield key, found_reason
    if found or len(keys) < 2:
        return
    for name, end in (("lower", 0), ("upper", -1)):
        recipe = {key: corners[key][end] for key in keys}
        if reason := _reason(experiment, recipe):
            yield "", f"all {name} ends together ({_shown(recipe)}) are not valid: {reason}"
            return
    for one, other in itertools.combinations(keys, 2):
        for pair in itertools.product(corners[one], corners[other]):
            recipe = {**given, **dict(zip((one, other), pair, strict=True))}
            if reason := _reason(experiment, recipe):
                yield one, f"{_shown(recipe)} are not valid together: {reason}"
                return


def point_problems(experiment: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """What is wrong with `sweep.points_to_evaluate`, as (dotted key, message)."""
    space = experiment.sweep.search_space
    seen: list[dict[str, Any]] = []
    if experiment.sweep.include_default:
        seen.append(own_recipe(experiment))
    for number, point in enumerate(experiment.sweep.points_to_evaluate):
        place = f"sweep.points_to_evaluate.{number}"
        outside = {key: _outside(space, key, value) for key, value in point.items()}
        problems = [(f"{place}.{key}", why) for key, why in outside.items() if why is not None]
        recipe = own_recipe(experiment, point) if not problems else {}
        problems += [
            (f"{place}.{key}", f"{key} is not searched here: its conditions do not hold")
            for key in point
            if not problems and key not in recipe
        ]
        if not problems and (invalid := _reason(experiment, recipe)):
            problems.append((place, f"{_shown(recipe)} is not valid: {invalid}"))
        if not problems and recipe in seen:
            problems.append((place, f"{_shown(recipe)} is tried already"))
        yield from problems
        seen.append(recipe)


def _outside(space: Space, key: str, value: Any) -> str | None:
    if key not in space:
        return f"no such key in sweep.search_space{did_you_mean(key, space)}"
    if not space[key].contains(value):
        return f"value {value!r} is not in sweep.search_space.{key}: {space[key].describe()}"
    return None


def own_recipe(
    experiment: ExperimentConfig, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The recipe of the experiment itself, with some values changed: every active key."""
    space = experiment.sweep.search_space
    own = {key: attrgetter(key)(experiment) for key in space}
    return active_keys(space, {**own, **(changes or {})})


def clone_recipe(
    experiment: ExperimentConfig, recipe: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """A trial's recipe with some values of the search space changed.

    Raises
    ------
    ConfigError
        If a key or value is not in the space, nothing changes, or the whole is not valid.
    """
    space = experiment.sweep.search_space
    for key, value in changes.items():
        if (why := _outside(space, key, value)) is not None:
            raise ConfigError(f"{key}: {why}")
    found = own_recipe(experiment, {**recipe, **changes})
    for key in changes:
        if key not in found:
            raise ConfigError(f"{key} is not searched here: its conditions do not hold")
    if found == own_recipe(experiment, recipe):
        raise ConfigError("nothing changes: the trial has these values already")
    if invalid := _reason(experiment, found):
        raise ConfigError(f"{_shown(found)} is not valid: {invalid}")
    return found


def _shown(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in recipe.items())


def _refusal(key: str, known: dict[str, Any]) -> str:
    if key in SHARED_TRAIN_KEYS:
        return (
            "a trial cannot vary this: the executor is resident and all trials of the sweep share "
            "it; run one sweep for each value"
        )
    if key in known or any(name.startswith(f"{key}.") for name in known):
        return "a trial can vary only single keys under lora. and train."
    return f"no such key in the experiment{did_you_mean(key, known)}"


def _invalid(
    experiment: ExperimentConfig, key: str, value: Any, given: dict[str, Any]
) -> str | None:
    recipe = {**given, key: value}
    if reason := _reason(experiment, recipe):
        others = {name: entry for name, entry in given.items() if name != key}
        where = f" with {_shown(others)}" if others else ""
        return f"value {value!r} is not valid{where}: {reason.removeprefix(f'{key}: ')}"
    read = attrgetter(key)(experiment.with_recipe(recipe))
    if read != value or isinstance(read, bool) != isinstance(value, bool):
        return f"value {value!r} is read as {read!r}; write it so"
    return None


def _reason(experiment: ExperimentConfig, recipe: dict[str, Any]) -> str | None:
    try:
        experiment.with_recipe(recipe)
    except ValidationError as error:
        return "; ".join(
            ": ".join(
                part
                for part in (
                    ".".join(map(str, problem["loc"])),
                    problem["msg"].removeprefix("Value error, "),
                )
                if part
            )
            for problem in error.errors()
        )
    return None
