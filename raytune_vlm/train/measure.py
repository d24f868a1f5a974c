"""Measures the steps of a run: speed, memory and use of the device."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from raytune_vlm.models.families import Family
from raytune_vlm.prepare.store import PreparedSplit
from raytune_vlm.train.flops import FlopCounter, peak_flops
from raytune_vlm.train.step_metrics import StepMetrics, Sums, peak_memory
from raytune_vlm.train.world import World


class Measure:
    """What `StepMetrics` says beyond the update itself.

    Parameters
    ----------
    model
        The base with its adapter on; hooks are in it until `close`.
    """

    def __init__(self, model: Any, family: Family, split: PreparedSplit, world: World) -> None:
        self._split, self._world = split, world
        self._counter = FlopCounter(model, family)
        self._peak: float | None = None
        if world.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(world.device)
            if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
                self._peak = peak_flops(torch.cuda.get_device_name(world.device))

    def forward_begins(self) -> None:
        """Forget what came since the last pass: the backward pass may have repeated layers."""
        self._counter.take()

    def forward_ends(self, sums: Sums, fed_tokens: int, share: float = 1.0) -> None:
        """Add what a forward pass took, or the share of it that was for this run."""
        vision, projector = self._counter.take()
        sums.vision_rows += vision * share
        sums.projector_rows += projector * share
        sums.fed_tokens += fed_tokens

    def metrics(self, rows: np.ndarray, sums: Sums, seconds: float, **update: Any) -> StepMetrics:
        """The figures of a step, from the sums over all ranks and what the update was."""
        lengths = self._split.lengths[rows].astype(np.int64)
        tokens, images = int(lengths.sum()), int(self._split.num_images[rows].sum())
        labelled = int(self._split.num_labelled[rows].sum())
        flops = self._counter.flops(
            tokens, float((lengths**2).sum()), sums.vision_rows, sums.projector_rows, labelled
        )
        mfu = None
        if flops is not None and self._peak is not None:
            mfu = flops / (seconds * self._peak * self._world.size)
        return StepMetrics(
            labelled_tokens=labelled,
            tokens=tokens,
            samples=len(rows),
            images=images,
            fed_tokens=int(sums.fed_tokens),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            samples_per_second=len(rows) / seconds,
            images_per_second=images / seconds,
            labelled_share=labelled / tokens,
            padding_share=1 - tokens / sums.fed_tokens,
            data_wait_share=sums.waited / (seconds * self._world.size),
            mfu=mfu,
            peak_memory_bytes=peak_memory(self._world.device),
            time=time.time(),
            **update,
        )

    def close(self) -> None:
        """Take the hooks off."""
        self._counter.close()
