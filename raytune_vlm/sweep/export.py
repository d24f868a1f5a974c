"""`raytune-vlm export`: the checkpoint of a sweep that is meant, checked, as a new folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raytune_vlm.config.distillation import DistillationConfig
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.loader import render
from raytune_vlm.errors import ConfigError, did_you_mean
from raytune_vlm.models.export import new_folder, write_adapter, write_merged
from raytune_vlm.models.location import check_model
from raytune_vlm.models.serving import VLLM_VERSION, Verdict, check_adapter
from raytune_vlm.records import SweepFolder, write_text
from raytune_vlm.report.model_card import model_card
from raytune_vlm.sweep.runner import recorded_experiment
from raytune_vlm.train.checkpoint import verify

BEST = "best"
"""In place of a trial id: the sweep's winner."""

Format = Literal["adapter", "merged"]


@dataclass(frozen=True)
class Exported:
    """What was written, and of what."""

    folder: Path
    trial_id: str
    step: int
    serving: Verdict | None
    """What vLLM does with the adapter; None for a merged model."""


def export(
    root: Path,
    output: Path,
    *,
    trial_id: str = BEST,
    step: int | None = None,
    form: Format,
    trust: str | None = None,
) -> Exported:
    """Write a trial's adapter, or the base merged with it, with processor, card and experiment.

    Without `step` it is the winner's own step for the winner, and for any other trial the one with
    the best score on `select` of those whose checkpoint is still there.

    Raises
    ------
    ConfigError
        If the folder is no sweep's, has no such trial or step, or `output` is not empty.
    CheckpointError
        If the checkpoint is not what its manifest says.
    ModelError
        If the base is not to be had, or the adapter cannot be merged into it.
    """
    folder, output = SweepFolder(root.resolve()), output.resolve()
    experiment = recorded_experiment(folder, trust)
    trial_id, step = chosen(folder, experiment, trial_id, step)
    trial = folder.trial(trial_id)
    family = check_model(experiment.model)
    serving = None
    with new_folder(output) as temporary:
        checkpoint = trial.checkpoint(step)
        verify(checkpoint)
        if form == "merged":
            write_merged(checkpoint, experiment.model, temporary)
        else:
            write_adapter(checkpoint, experiment.model, temporary)
            serving = check_adapter(temporary, family.model_type)
        own = own_experiment(experiment, trial.record().recipe, trial_id.replace("/", "-"))
        write_text(temporary / "experiment.yaml", render(own))
        card = model_card(folder, trial_id, step, place=output.name, merged=form == "merged")
        write_text(temporary / "README.md", card)
    return Exported(output, trial_id, step, serving)


def serving_lines(written: Exported) -> list[str]:
    """What to say of vLLM and an exported adapter; nothing of a merged model."""
    if written.serving is None:
        return []
    problems, options = written.serving.problems, " ".join(written.serving.options)
    return [f"not for vLLM: {problem}" for problem in problems] or [
        f"vLLM: by the source of {VLLM_VERSION} it can serve this: vllm serve BASE {options} "
        f"--lora-modules {written.folder.name}={written.folder}"
    ]


def own_experiment(
    experiment: ExperimentConfig, recipe: dict[str, object], suffix: str
) -> ExperimentConfig:
    """The experiment that trains one recipe of a sweep and searches nothing."""
    own = experiment.with_recipe(recipe)
    if not own.train.distillation.is_on:  # a teacher that the search left out
        alone = own.train.model_copy(update={"distillation": DistillationConfig()})
        own = own.model_copy(update={"train": alone})
    plain = own.sweep.model_copy(update={"search_space": {}})
    return own.model_copy(update={"sweep": plain, "name": f"{experiment.name}-{suffix}"})


def chosen(
    folder: SweepFolder, experiment: ExperimentConfig, trial_id: str, step: int | None
) -> tuple[str, int]:
    """The trial and step that are meant.

    Raises
    ------
    ConfigError
        If there is no such trial, or it has no checkpoint of that step.
    """
    root, result = folder.root, folder.result()
    files = (root / "trials").rglob("trial.json")
    known = sorted(file.parent.relative_to(root / "trials").as_posix() for file in files)
    wanted = trial_id
    if trial_id == BEST:
        if result is None and len(known) != 1:
            raise ConfigError(
                f"{root} has no winner yet; give --trial: {', '.join(known) or 'it has none'}"
            )
        wanted = result.winner if result is not None else known[0]
    if wanted not in known:
        raise ConfigError(f"{root} has no trial {wanted!r}{did_you_mean(wanted, [*known, BEST])}")
    there = sorted(
        int(found.name.removeprefix("step_"))
        for found in folder.trial(wanted).checkpoints.glob("step_*")
    )
    if not there:
        raise ConfigError(f"{folder.trial(wanted).root} has no checkpoint")
    if step is None:
        is_winner = result is not None and wanted == result.winner
        step = result.winner_step if result and is_winner else _best(folder, experiment, wanted)
        step = there[-1] if step is None else step
    if step not in there:
        steps = ", ".join(map(str, there))
        raise ConfigError(f"{wanted} has no checkpoint of step {step} (it has: {steps})")
    return wanted, step


def _best(folder: SweepFolder, experiment: ExperimentConfig, trial_id: str) -> int | None:
    """The step with the best score on `select`, of those whose checkpoint is there."""
    trial, sign = folder.trial(trial_id), 1 if experiment.mode == "max" else -1
    found = trial.scores("select")
    most = max((scores.num_samples for scores in found), default=0)
    values = {
        scores.step: sign * scores.metrics[experiment.metric].value
        for scores in found
        if scores.num_samples == most and trial.checkpoint(scores.step).exists()
    }
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    return max(finite, key=lambda step: (finite[step], -step)) if finite else None
