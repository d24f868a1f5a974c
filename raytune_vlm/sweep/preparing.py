"""What a run needs before it starts: checked, prepared and noted in its folder."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_vlm.config.experiment import ExperimentConfig, fingerprint_of
from raytune_vlm.config.search_space import search_space_problems
from raytune_vlm.errors import ConfigError, DataError
from raytune_vlm.models.location import check_model
from raytune_vlm.models.teacher import check_teacher
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.facts import write_facts
from raytune_vlm.prepare.overlap import write_overlaps
from raytune_vlm.prepare.plan import Plan, plan_spec, resolved_steps
from raytune_vlm.prepare.prepare import (
    PreparedData,
    list_shards,
    prepare,
    write_quarantine,
)
from raytune_vlm.prepare.shard import ShardJob
from raytune_vlm.records import Scores, SweepFolder, write_json
from raytune_vlm.sweep.cluster import check_storage, runs_in_copy
from raytune_vlm.sweep.detect import detectable_lines
from raytune_vlm.sweep.head import read_head
from raytune_vlm.sweep.waiting import wait_for_a_cpu
from raytune_vlm.train.packages import check_packages, check_searcher, check_trackers


def located(experiment: ExperimentConfig) -> ExperimentConfig:
    """The experiment with absolute local paths: Ray's workers run in folders of their own.

    Raises
    ------
    ConfigError
        If results would lie in a job's copy of its working directory.
    """
    if runs_in_copy():
        check_storage(experiment.storage_path)
    model, data = experiment.model, experiment.data
    local = model.name != "demo" and Path(model.name).is_dir()
    name = str(Path(model.name).resolve()) if local else model.name
    train, own = experiment.train, experiment.train.distillation
    here = {
        key: str(Path(path).resolve())
        for key, path in (("teacher", own.teacher), ("adapter", own.adapter))
        if path not in (None, "demo") and Path(path).is_dir()
    }
    return experiment.model_copy(
        update={
            "storage_path": str(Path(experiment.storage_path).resolve()),
            "model": model.model_copy(update={"name": name}),
            "train": train.model_copy(update={"distillation": own.model_copy(update=here)}),
            "data": data.model_copy(update={"root": str(Path(data.root).resolve())}),
        }
    )


def plan_of(experiment: ExperimentConfig) -> list[ShardJob]:
    """Everything that can be checked before Ray starts: model, scopes, sources, resources.

    Raises
    ------
    ModelError, DataError, ConfigError
        One clear line about what is wrong.
    """
    check_packages(experiment.train)
    check_searcher(experiment.sweep)
    check_trackers(experiment.report)
    family = check_model(experiment.model)
    family.check_scopes(experiment.lora_scopes())
    family.check_packing(experiment.train.pack_tokens)
    check_teacher(experiment)
    return list_shards(experiment)


def prepare_data(
    experiment: ExperimentConfig,
    jobs: list[ShardJob],
    monitor: Monitor,
    *,
    for_training: bool = True,
) -> PreparedData:
    """Prepare the data and say what it is; see `prepare.prepare`."""
    monitor.say(f"data: {len(jobs)} shards of {len(experiment.data.sources)} sources")
    begun: set[str] = set()

    def progress(step: str, done: int, total: int) -> None:
        monitor.progress(f"data: shards, {step}", done, total)
        if done < total and step not in begun:  # tasks are about to start
            begun.add(step)
            wait_for_a_cpu(monitor)

    data = prepare(experiment, jobs, progress, for_training=for_training)
    splits = ", ".join(f"{name} {entry.num_used}" for name, entry in data.manifest.splits.items())
    monitor.say(
        f"data: {splits} samples; {len(data.quarantine)} quarantined "
        f"({data.manifest.seconds:.1f} s, {data.manifest.digest})"
    )
    monitor.say(f"data: tier {data.manifest.tier}: {data.manifest.tier_reason}")
    for pair, count in data.manifest.overlap.items():
        known, asked = pair.split("/")
        kinds = ", ".join(
            f"{kind.replace('_', ' ')} {number}"
            for kind, number in data.manifest.overlap_kinds[pair].items()
        )
        monitor.say(f"data: WARNING: {count} samples of {asked} are like some of {known} ({kinds})")
    return data


def with_steps(
    experiment: ExperimentConfig, data: PreparedData, monitor: Monitor
) -> ExperimentConfig:
    """The experiment with `train.max_steps` in place of `train.epochs`; see `resolved_steps`.

    Raises
    ------
    ConfigError
        If rungs or warm-up do not fit so many steps.
    """
    if experiment.train.epochs is None:
        return experiment
    steps = resolved_steps(experiment, _plan(experiment, data))
    monitor.say(f"train: {experiment.train.epochs:g} epochs are {steps} steps")
    try:
        resolved = experiment.with_recipe({"train.epochs": None, "train.max_steps": steps})
    except ValidationError as error:
        problems = [str(entry["msg"]).removeprefix("Value error, ") for entry in error.errors()]
    else:
        problems = [f"{key}: {why}" for key, why in search_space_problems(resolved)]
    if problems:
        raise ConfigError(
            f"train.epochs={experiment.train.epochs:g} are {steps} steps: {'; '.join(problems)}"
        )
    return resolved


def say_detectable(
    experiment: ExperimentConfig,
    data: PreparedData,
    monitor: Monitor,
    pilot: Scores | None = None,
) -> None:
    """Say which differences the splits can tell, before anything is trained."""
    sizes = {name: (e.num_used, e.num_groups) for name, e in data.manifest.splits.items()}
    for line in detectable_lines(experiment, sizes, pilot):
        monitor.say(f"data: {line}")


def require_splits(data: PreparedData, *names: str) -> None:
    """Raise DataError for a split without samples."""
    for name in names:
        if data.manifest.splits[name].num_used == 0:
            raise DataError(
                f"data.sources: no samples for {name!r}: give a source with split: {name}, or a "
                f"larger data.split.{name} for the {data.manifest.splits['train'].num_groups} "
                "groups there are"
            )


def write_head(
    folder: SweepFolder, experiment: ExperimentConfig, data: PreparedData, command: str
) -> None:
    """`experiment.json` and `data/`: written last before trials start, so that bad input
    leaves no sweep folder."""
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(folder.manifest_file, data.manifest)
    write_json(folder.plan_file, _plan_record(experiment, data))
    write_quarantine(folder.quarantine_file, data.quarantine)
    write_overlaps(folder.overlap_file, data.overlaps)
    write_facts(folder.facts_file, data.split("report"), experiment.data)
    write_json(
        folder.experiment_file,
        {
            "fingerprint": experiment.fingerprint(),
            "data": data.manifest.digest,
            "versions": versions(),
            "command": command,
            "trusted_code": experiment.model.trusted_revision,
            "experiment": experiment.model_dump(mode="json"),
        },
    )


def versions() -> dict[str, str]:
    """What the results of a sweep depend on, besides its experiment and its data."""
    packages = ("ray", "torch", "transformers", "peft", "optuna", "pyarrow", "pillow", "numpy")
    return {
        "python": platform.python_version(),
        "raytune-vlm": version("raytune-vlm"),
        **{name: version(name) for name in packages},
    }


def check_head(folder: SweepFolder, monitor: Monitor) -> dict[str, Any]:
    """Say which versions changed since a sweep began; returns what `experiment.json` holds.

    Raises
    ------
    ConfigError
        If its experiment is not the one that it began with.
    """
    head = read_head(folder, "fingerprint", "data", "versions")
    if head["fingerprint"] != fingerprint_of(head["experiment"], head.get("trusted_code")):
        raise ConfigError(
            f"{folder.experiment_file} was changed since the sweep began: its trials could not be "
            "compared; put it back, or start a new sweep"
        )
    changed = [
        f"{name} {before} -> {now}"
        for name, now in versions().items()
        if (before := head["versions"].get(name, "none")) != now
    ]
    if changed:
        monitor.say(
            f"WARNING: changed since the sweep began: {', '.join(changed)}; what is trained from "
            "here on need not be what it would have been"
        )
    return head


def _plan(experiment: ExperimentConfig, data: PreparedData) -> Plan:
    split, spec = data.split("train"), plan_spec(experiment)
    return Plan(split.lengths, split.sources, spec, data_digest=data.manifest.digest)


def _plan_record(experiment: ExperimentConfig, data: PreparedData) -> dict[str, Any]:
    """What `data/plan.json` says: which samples make up which step follows from it."""
    plan = _plan(experiment, data)
    return {
        "digest": plan.digest,
        "data": data.manifest.digest,
        "num_samples": len(data.split("train")),
        "num_steps": resolved_steps(experiment, plan),
        **asdict(plan.spec),
    }
