"""The teacher of `train.distillation`: found, compared with the student's model, loaded.

It is shown the very batches that are made for the student, so family, tokenizer and processor have
to be the same; only the size of the model may differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError, first_line
from raytune_vlm.models.adapter_file import read_tensors, weights_as_saved
from raytune_vlm.models.families import Family
from raytune_vlm.models.loading import Base, load_base, load_processor
from raytune_vlm.models.location import check_model

KEY = "train.distillation.teacher"

_NAMES = ("processor_class", "image_processor_type")
"""Keys of a processor that say nothing of what it does."""

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def teacher_config(experiment: ExperimentConfig) -> ModelConfig:
    """The teacher as a model: loaded as the student's is, but for its name.

    Code of its own is trusted if it is the student's model at the same revision.
    """
    own, model = experiment.train.distillation, experiment.model
    assert own.teacher is not None
    other = model.model_copy(update={"name": own.teacher, "revision": own.revision})
    return other if _is_own(experiment) else other.trusting(None)


def check_teacher(experiment: ExperimentConfig) -> None:
    """Whether the teacher, if there is one, can be shown the student's batches; loads no weights.

    Raises
    ------
    ModelError
        If it is not found, or of another family, tokenizer or processor, or its adapter is none.
    """
    own = experiment.train.distillation
    if own.teacher is None:
        return
    if own.adapter is not None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(own.adapter) / name).is_file():
                raise ModelError(f"train.distillation.adapter={own.adapter!r}: it holds no {name}")
    if _is_own(experiment):
        return
    config = teacher_config(experiment)
    with _named():
        theirs: Family = check_model(config)
    ours = check_model(experiment.model)
    if theirs.model_type != ours.model_type:
        _differ(experiment, "family", theirs.model_type, ours.model_type)
    with _named():
        teacher = load_processor(config)
    student = load_processor(experiment.model)
    _check_tokenizers(experiment, teacher.tokenizer, student.tokenizer)
    found, expected = dict(_settings(teacher.to_dict())), dict(_settings(student.to_dict()))
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            _differ(experiment, f"processor's {name}", found.get(name), expected.get(name))


def load_teacher(experiment: ExperimentConfig, device: str) -> Base:
    """The teacher, frozen, in evaluation mode, its adapter on, on a device.

    Raises
    ------
    ModelError
        If it cannot be loaded, or the adapter is not one of this model.
    """
    with _named():
        base = load_base(teacher_config(experiment), device)
    folder = experiment.train.distillation.adapter
    if folder is not None:
        _put_on(Path(folder), base.model, device)
    base.model.requires_grad_(False).eval()
    return base


def _put_on(folder: Path, model: Any, device: str) -> None:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(action="ignore"):  # it only warns of what is missing
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=device)
        tensors = read_tensors(folder / "adapter_model.safetensors")
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise ModelError(f"train.distillation.adapter={str(folder)!r}: {reason}") from error
    odd = sorted(tensors.keys() ^ weights_as_saved(adapted).keys())
    if odd:  # PEFT passes over what does not fit
        raise ModelError(
            f"train.distillation.adapter={str(folder)!r} does not fit the teacher at {odd[0]}"
        )


def _is_own(experiment: ExperimentConfig) -> bool:
    own, model = experiment.train.distillation, experiment.model
    return (own.teacher, own.revision) == (model.name, model.revision)


def _check_tokenizers(experiment: ExperimentConfig, teacher: Any, student: Any) -> None:
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    odd = sorted(
        token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)
    )
    if odd:
        token = odd[0]
        _differ(experiment, f"tokenizer's id of {token!r}", theirs.get(token), ours.get(token))
    for name in _SPECIAL:
        if getattr(teacher, name) != getattr(student, name):
            what = f"tokenizer's {name}"
            _differ(experiment, what, getattr(teacher, name), getattr(student, name))


def _settings(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of all that a processor is told."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif name not in _NAMES:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _differ(experiment: ExperimentConfig, what: str, theirs: Any, ours: Any) -> None:
    own, model = experiment.train.distillation, experiment.model
    raise ModelError(
        f"{KEY}={own.teacher!r}: its {what} is {theirs!r}, that of model.name={model.name!r} is "
        f"{ours!r}; a teacher is shown what was made for the student"
    )


@contextmanager
def _named() -> Iterator[None]:
    """Errors name the teacher's key, not the student's."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.name=", f"{KEY}=", 1)) from error
