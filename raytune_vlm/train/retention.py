"""Which checkpoints of a trial stay, and room on the disk for the next one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from raytune_vlm.errors import StorageFull
from raytune_vlm.train.checkpoint import steps

SMALL_FILES = 1 << 18
"""Bytes taken for headers, configs and random states before a first checkpoint tells."""


@dataclass(frozen=True)
class Retention:
    """What stays of a trial's checkpoints.

    Attributes
    ----------
    newest
        How many of the newest regular ones.
    best
        How many of the best scored ones.
    maximise
        Whether a higher score is better.
    """

    newest: int
    best: int
    maximise: bool

    def pinned(self, scores: Mapping[int, float]) -> set[int]:
        """The best scored steps, the earliest among equals: what the decision may choose.

        A score that is not a number is worse than any that is.
        """
        sign = -1.0 if self.maximise else 1.0

        def order(step: int) -> tuple[bool, float, int]:
            value = scores[step]
            return value != value, sign * value, step

        return set(sorted(scores, key=order)[: self.best])

    def apply(
        self, checkpoints: Path, scores: Mapping[int, float], is_regular: Callable[[int], bool]
    ) -> None:
        """Delete the others. What was saved out of turn goes once there is a newer one."""
        there = steps(checkpoints)
        kept = self.pinned(scores) | set(sorted(filter(is_regular, there))[-self.newest :])
        kept.add(max(there, default=0))
        _delete(checkpoints, there.keys() - kept)


def needed_bytes(model: torch.nn.Module, checkpoints: Path) -> int:
    """What the next checkpoint will take: as much as the newest one there, else predicted.

    The prediction is the trained weights and AdamW's two moments of each.
    """
    there = steps(checkpoints)
    if there:
        newest = there[max(there)]
        return sum(file.stat().st_size for file in newest.iterdir())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 3 * trained + SMALL_FILES


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written on the file system that a folder is or will be on."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free


def make_room(
    checkpoints: Path,
    needed: int,
    pinned: set[int],
    *,
    free: Callable[[Path], int] = free_bytes,
) -> None:
    """See that a checkpoint of `needed` bytes fits, with a tenth and 1 MiB to spare.

    Where it does not, all checkpoints go but the newest and the pinned ones.

    Raises
    ------
    StorageFull
        If it does not fit even then.
    """
    wanted = needed + needed // 10 + (1 << 20)
    if free(checkpoints) >= wanted:
        return
    there = steps(checkpoints)
    _delete(checkpoints, there.keys() - pinned - {max(there, default=0)})
    left = free(checkpoints)
    if left < wanted:
        raise StorageFull(
            f"{checkpoints}: the next checkpoint needs {wanted / 1e6:.1f} MB with its margin, but "
            f"{left / 1e6:.1f} MB are free; make room there"
        )


def _delete(checkpoints: Path, chosen: set[int]) -> None:
    there = steps(checkpoints)
    for step in chosen:
        shutil.rmtree(there[step])
