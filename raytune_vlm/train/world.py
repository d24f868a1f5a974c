"""Who this process is among the workers of one executor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank, number of workers and device of this worker; one worker needs no communication."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls) -> World:
        """The world that Ray Train set up, or a single worker where there is none."""
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        if not dist.is_initialized():
            return cls(device=device)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def align(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give tensors rank 0's values on every rank, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor.detach(), src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes
