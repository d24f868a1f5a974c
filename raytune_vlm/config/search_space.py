"""Is a search space one that trials can run? Asked when the experiment is read, not on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from pydantic import BaseModel, ValidationError

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.sweep import flatten
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import did_you_mean

SHARED_TRAIN_KEYS = (
    "train.max_steps",
    "train.backend",
    "train.fsdp2.shard_size",
    "train.fsdp2.compute_dtype",
    "train.deepspeed.stage",
    "train.deepspeed.offload_optimizer",
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
    every one of any other key, and all lower (upper) ends together.
    """
    space = experiment.sweep.search_space
    known = flatten(experiment.model_dump())
    found = False
    for key, distribution in space.items():
        reasons = [_refusal(key, known)] if key not in searchable_keys() else []
        if not reasons:
            values = distribution.corners()
            reasons = [reason for value in values if (reason := _invalid(experiment, key, value))]
        for reason in reasons[:1]:
            found = True
            yield key, reason
    if found or len(space) < 2:
        return
    for name, end in (("lower", 0), ("upper", -1)):
        recipe = {key: distribution.corners()[end] for key, distribution in space.items()}
        if reason := _reason(experiment, recipe):
            yield "", f"all {name} ends together ({_shown(recipe)}) are not valid: {reason}"
            return
    for one, other in itertools.combinations(space, 2):
        for pair in itertools.product(space[one].corners(), space[other].corners()):
            recipe = dict(zip((one, other), pair, strict=True))
            if reason := _reason(experiment, recipe):
                yield one, f"{_shown(recipe)} are not valid together: {reason}"
                return


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


def _invalid(experiment: ExperimentConfig, key: str, value: Any) -> str | None:
    if reason := _reason(experiment, {key: value}):
        return f"value {value!r} is not valid: {reason.removeprefix(f'{key}: ')}"
    read = attrgetter(key)(experiment.with_recipe({key: value}))
    if read != value:
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
