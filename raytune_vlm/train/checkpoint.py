"""Checkpoints that are whole or not there: temporary name, manifest, fsync, rename. No pickle.

checkpoints/step_000200/
  adapter_model.safetensors, adapter_config.json   PEFT's own format
  optimizer.safetensors                            AdamW moments by parameter name, random
                                                   state by rank
  state.json                                       step, plan digest, samples seen, skipped steps
  manifest.json                                    sha256 and bytes of each of these
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.config.train import WITHOUT_EFFECT
from raytune_vlm.errors import CheckpointError, StorageFull
from raytune_vlm.models.adapter_file import load_adapter, read_tensors, save_adapter
from raytune_vlm.records import as_record, read_json, write_json
from raytune_vlm.train import random_state

if TYPE_CHECKING:
    from peft import PeftModel

_MANIFEST = "manifest.json"
_NEEDED = ("adapter_model.safetensors", "optimizer.safetensors", "state.json")
"""What a manifest must list: without one of these nothing can be continued."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands; with the plan's digest, all that the data cursor needs."""

    step: int
    plan_digest: str
    recipe_digest: str
    samples_seen: int
    skipped_steps: int = 0
    overflowed_steps: int = 0
    micro_batch: dict[str, Any] | None = None
    """The `MicroBatchLimit` in force, if memory did not suffice for the recipe's own."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the gradient scaler of a float16 base; empty for any other."""


def recipe_digest(experiment: ExperimentConfig) -> str:
    """Digest of what a checkpoint must agree with to be continued."""
    train = experiment.train.model_dump(exclude={**WITHOUT_EFFECT, "checkpoint_every": True})
    return digest_of({"lora": experiment.lora.model_dump(), "train": train})


def save(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    rng_states: list[dict[str, torch.Tensor]],
) -> Path:
    """Write a checkpoint folder; readers see it whole or not at all.

    `rng_states` holds `random_state.capture` of every rank.

    Raises
    ------
    CheckpointError
        If it cannot be written (`StorageFull`: for want of room); nothing is left of it then, and
        the checkpoints that were there before still are.
    """
    with _whole(folder) as temporary:
        save_adapter(model, temporary)
        tensors = _optimizer_tensors(model, optimizer)
        for rank, found in enumerate(rng_states):
            tensors |= {f"rng/{rank}/{kind}": value for kind, value in found.items()}
        save_file(tensors, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", state)
    return folder


def adopt(source: Path, folder: Path, experiment: ExperimentConfig) -> None:
    """Copy a checkpoint of another trial, to be continued with the recipe of an experiment:
    adapter, optimizer, random state and place in the data stay what they are.

    Raises
    ------
    CheckpointError
        If the source is not whole, or the copy cannot be written.
    """
    verify(source)
    with _whole(folder) as temporary:
        for name in read_json(source / _MANIFEST):
            shutil.copyfile(source / name, temporary / name)
        state = read_json(source / "state.json")
        write_json(temporary / "state.json", {**state, "recipe_digest": recipe_digest(experiment)})


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `folder` with a manifest; see `save`."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        manifest = {
            file.name: {"sha256": _sha256(file), "bytes": file.stat().st_size}
            for file in sorted(temporary.iterdir())
        }
        write_json(temporary / _MANIFEST, manifest)
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        if folder.exists():
            folder.rename(temporary.with_name(f"{temporary.name}.old"))
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        # safetensors tells the reason in words only.
        is_full = any(os.strerror(reason) in str(error) for reason in (ENOSPC, EDQUOT))
        kind = StorageFull if is_full else CheckpointError
        raise kind(f"{folder}: the checkpoint could not be written: {error}") from None
    finally:
        clear_leftovers(folder.parent, f"{temporary.name}*")


def clear_leftovers(checkpoints: Path, pattern: str = ".step_*") -> None:
    """Delete what writers that were killed have left; nobody may be writing there."""
    for left in checkpoints.glob(pattern):
        shutil.rmtree(left, ignore_errors=True)


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises
    ------
    CheckpointError
        Naming the file that is missing, truncated or altered.
    """
    if not (folder / _MANIFEST).is_file():
        raise CheckpointError(f"{folder}: no {_MANIFEST}: the checkpoint was never finished")
    try:
        manifest = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in read_json(folder / _MANIFEST).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/{_MANIFEST} is damaged: {error!r:.200}") from None
    missing = [name for name in _NEEDED if name not in manifest]
    if missing:
        raise CheckpointError(f"{folder}/{_MANIFEST} is damaged: it does not list {missing[0]}")
    for name, (num_bytes, sha256) in manifest.items():
        if name != Path(name).name:
            raise CheckpointError(f"{folder}/{_MANIFEST} is damaged: it lists {name!r}")
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != num_bytes:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {num_bytes}")
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file} was altered: its sha256 is not the manifest's")


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what was wrong with newer ones that were passed over."""
    damaged: list[str] = []
    for _, folder in sorted(steps(checkpoints).items(), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            damaged.append(error.message)
        else:
            return folder, damaged
    return None, damaged


def load(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    device: str,
) -> RunState:
    """Load adapter, optimizer and this rank's random state from a verified checkpoint, in place.

    A rank that the run did not have keeps the random state that it was seeded with.

    Raises
    ------
    CheckpointError
        If the tensors are not those of the model and its optimizer, a file is no safetensors
        file, or the state is none.
    """
    load_adapter(folder, model)
    tensors = read_tensors(folder / "optimizer.safetensors")
    state = _run_state(folder)
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        states.setdefault(owner, {})[key] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = states.get(names[parameter])
            if found is not None:
                _check_moments(folder, names[parameter], parameter, found)
                optimizer.state[parameter] = {
                    key: tensor.to("cpu" if key == "step" else parameter.device)
                    for key, tensor in found.items()
                }
    prefix = f"rng/{rank}/"
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    try:
        random_state.restore(own, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its random state is damaged: {error!r:.200}") from None
    return state


def _run_state(folder: Path) -> RunState:
    try:
        return as_record(RunState, read_json(folder / "state.json"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{folder}/state.json is damaged: {error}") from None


def _check_moments(
    folder: Path, name: str, parameter: torch.Tensor, found: dict[str, torch.Tensor]
) -> None:
    """Raise CheckpointError unless the optimizer's tensors have the shape of their parameter."""
    for key, tensor in found.items():
        if tensor.shape not in (parameter.shape, torch.Size(())):
            raise CheckpointError(
                f"{folder}: {key} of {name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
            )


def steps(checkpoints: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint, damaged ones too."""
    found = {folder.name.removeprefix("step_"): folder for folder in checkpoints.glob("step_*")}
    return {int(step): folder for step, folder in found.items() if step.isdecimal()}


def _optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}/{key}"] = value.detach().cpu().contiguous()
    return tensors


def _sync(file: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
