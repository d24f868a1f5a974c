"""What a job is sent of the working directory, counted before anything is packed.

The walk is Ray's own, with its rules (`.gitignore`, `.rayignore`, excludes), so that what is
counted here is what Ray will pack.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import ConfigError
from raytune_vlm.sources.remote import is_remote
from raytune_vlm.sweep.cluster import check_storage

EXCLUDES = (
    "runs",
    ".*_cache",
    ".cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    "*.egg-info",
    ".env",
    ".env.*",
    ".netrc",
)
"""Patterns, as in `.gitignore`, of what no job needs; Ray adds `.git`, `.venv` and their like."""

_ZIP_FILE_BYTES, _ZIP_BYTES = 30 + 46, 22
"""What a ZIP file holds besides contents and names (each twice): a file, and at its end."""

NUM_NAMED = 3


@dataclass(frozen=True)
class Sent:
    """A working directory as it is sent."""

    root: Path
    excludes: Sequence[str]
    sizes: Mapping[str, int]
    """File, relative to the root -> bytes."""

    @property
    def num_bytes(self) -> int:
        """Of the package that Ray makes of it, without compression."""
        names = sum(2 * len(name.encode()) + _ZIP_FILE_BYTES for name in self.sizes)
        return sum(self.sizes.values()) + names + _ZIP_BYTES

    def holds(self, path: str) -> bool:
        """Whether a file of this relative path, or one below it, is sent."""
        inside = os.path.normpath(path)
        return inside == "." or any(
            name == inside or name.startswith(f"{inside}/") for name in self.sizes
        )


def count_sent(root: Path, excludes: Sequence[str]) -> Sent:
    """Walk a working directory as Ray will when it packs it.

    Raises
    ------
    ConfigError
        If there is no such folder, or Ray's job server takes less than it holds.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    if not root.is_dir():
        raise ConfigError(f"--working-dir {root}: no such folder")
    root = root.resolve()
    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size

    patterns = [*ray_constants.get_runtime_env_default_excludes(), *EXCLUDES, *excludes]
    ignore_file = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, [_get_excludes(root, patterns)], add, include_gitignore=ignore_file)
    sent = Sent(root, [*EXCLUDES, *excludes], sizes)
    _check_size(sent, ray_constants.DASHBOARD_CLIENT_MAX_SIZE)
    return sent


def _check_size(sent: Sent, most: int) -> None:
    if sent.num_bytes <= most:
        return
    largest = sorted(sent.sizes, key=lambda name: -sent.sizes[name])[:NUM_NAMED]
    named = ", ".join(f"{name} ({mib(sent.sizes[name])})" for name in largest)
    raise ConfigError(
        f"--working-dir {sent.root}: {len(sent.sizes):,} files of {mib(sent.num_bytes)}, and Ray "
        f"takes {mib(most)}; the largest are {named}: keep data on storage that all nodes see, or "
        "leave out files by --exclude PATTERN, .gitignore or .rayignore"
    )


def check_paths(experiment: ExperimentConfig, file: Path, sent: Sent) -> str:
    """See that the job will find what it reads, and that what it writes will stay.

    A job runs in Ray's copy of the working directory, on the head node, and Ray deletes the copy.
    Returns the path of the experiment file in there.

    Raises
    ------
    ConfigError
        If the experiment, its data or its model is not sent though its path says so, or the
        storage folder is relative.
    """
    check_storage(experiment.storage_path)
    there = os.path.relpath(file.resolve(), sent.root)
    needed = {"EXPERIMENT": there}
    local = [s.path for s in experiment.data.sources if not is_remote(s.path)]
    if any(not Path(path).is_absolute() for path in local):
        needed["data.root"] = experiment.data.root
    model = experiment.model.name
    if model != "demo" and (sent.root / model).is_dir():
        needed["model.name"] = model
    own = experiment.train.distillation
    if own.teacher not in (None, "demo") and (sent.root / own.teacher).is_dir():
        needed["train.distillation.teacher"] = own.teacher
    if own.adapter is not None:
        needed["train.distillation.adapter"] = own.adapter
    for key, path in needed.items():
        if not Path(path).is_absolute() and not sent.holds(path):
            raise ConfigError(
                f"{key} {path}: nothing of it is sent with the working directory {sent.root}; let "
                "it be sent, or give an absolute path that all nodes see"
            )
    return there


def mib(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.1f} MiB"
