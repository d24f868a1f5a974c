"""Checkpoints that are whole or not there: temporary name, manifest, rename. No pickle.

checkpoints/step_000200/
  adapter_model.safetensors, adapter_config.json   PEFT's own format
  optimizer.safetensors                            AdamW moments by parameter name, RNG by rank
  state.json                                       step, plan digest, samples seen
  manifest.json                                    sha256 and bytes of each of these
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from raytune_vlm.errors import CheckpointError
from raytune_vlm.models.adapter_file import load_adapter, save_adapter
from raytune_vlm.records import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel

_MANIFEST = "manifest.json"


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


def rng_state(device: str) -> dict[str, torch.Tensor]:
    """This process's random state: torch's, and the accelerator's where there is one."""
    found = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def save(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    rng_states: list[dict[str, torch.Tensor]],
) -> Path:
    """Write a checkpoint folder; readers see it whole or not at all.

    `rng_states` holds `rng_state` of every rank.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        save_adapter(model, temporary)
        tensors = _optimizer_tensors(model, optimizer)
        for rank, found in enumerate(rng_states):
            tensors |= {f"rng/{rank}/{kind}": value for kind, value in found.items()}
        save_file(tensors, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", state)
        manifest = {
            file.name: {"sha256": _sha256(file), "bytes": file.stat().st_size}
            for file in sorted(temporary.iterdir())
        }
        write_json(temporary / _MANIFEST, manifest)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises
    ------
    CheckpointError
        Naming the file that is missing, truncated or altered.
    """
    if not (folder / _MANIFEST).exists():
        raise CheckpointError(f"{folder}: no {_MANIFEST}: the checkpoint was never finished")
    try:
        manifest = read_json(folder / _MANIFEST)
    except ValueError as error:
        raise CheckpointError(f"{folder}/{_MANIFEST} is damaged: {error}") from None
    for name, entry in manifest.items():
        file = folder / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} was altered: its sha256 is not the manifest's")


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what was wrong with newer ones that were passed over."""
    damaged: list[str] = []
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
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
        If the adapter's tensors are not those of the model.
    """
    load_adapter(folder, model)
    tensors = load_file(folder / "optimizer.safetensors")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            if f"{name}/exp_avg" in tensors:
                optimizer.state[parameter] = {
                    key: tensors[f"{name}/{key}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
    if f"rng/{rank}/cpu" in tensors:
        torch.set_rng_state(tensors[f"rng/{rank}/cpu"])
    if f"rng/{rank}/cuda" in tensors and device.startswith("cuda"):
        torch.cuda.set_rng_state(tensors[f"rng/{rank}/cuda"], device)
    return RunState(**read_json(folder / "state.json"))


def retain(checkpoints: Path, keep: int, pinned: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and those of the pinned steps."""
    folders = sorted(checkpoints.glob("step_*"))
    for folder in folders[:-keep]:
        if int(folder.name.removeprefix("step_")) not in pinned:
            shutil.rmtree(folder)


def _optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}/{key}"] = value.detach().cpu().contiguous()
    return tensors


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
