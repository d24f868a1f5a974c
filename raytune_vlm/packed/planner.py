"""How many slots pay, measured on the base itself before a sweep starts.

Twice as many at a time, until the last doubling gained too little or the next would not fit. With
several workers the time is rank 0's, the memory that of the fullest GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from raytune_vlm.packed.host import Host
from raytune_vlm.packed.slot import Slot
from raytune_vlm.train.run import Run
from raytune_vlm.train.step_metrics import StepMetrics
from raytune_vlm.train.world import World

LEAST_GAIN = 0.05
"""More tokens a second that a doubling has to bring, as a share."""

MOST_MEMORY = 0.9
"""Of a GPU's memory, as a share."""

STEPS = 3
"""Measured steps of each number of slots, after one that is not."""


@dataclass(frozen=True)
class Probe:
    """What so many slots at once did."""

    slots: int
    tokens_per_second: float
    """Tokens of all slots, padding not counted."""
    peak_bytes: int | None = None
    """The most that torch had allocated on a GPU; None on CPU."""


def measure(
    host: Host,
    make: Callable[[int], Run],
    world: World,
    most: int,
    go_on: Callable[[], object] = lambda: None,
) -> tuple[list[Probe], str]:
    """Probes of 1, 2, 4, ... slots, and why there are no more.

    Parameters
    ----------
    host
        Of mode `fast`.
    make
        Makes the run of the n-th slot.
    most
        Slots that a sweep has trials for.
    go_on
        Called between two steps.

    Raises
    ------
    RaytuneVlmError
        What ends a trial by itself: the audit of its first step fails, say.
    """
    slots: list[Slot] = []
    probes: list[Probe] = []
    device, is_gpu = world.device, world.device.startswith("cuda")
    total = torch.cuda.get_device_properties(device).total_memory if is_gpu else None
    total = world.broadcast(total)
    try:
        while (reason := why_no_more(probes, most, total, host.together)) is None:
            for number in range(len(slots), 2 * probes[-1].slots if probes else 1):
                slots.append(Slot(make(number), device))
            if is_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            _steps(host, slots, 1, go_on)
            seconds, tokens = _steps(host, slots, STEPS, go_on)
            if host.notes:
                reason, host.notes = host.notes[0], []
                return probes, reason
            peak = max(world.gather(torch.cuda.max_memory_allocated(device))) if is_gpu else None
            probes.append(Probe(len(slots), tokens / world.broadcast(seconds), peak))
    finally:
        for slot in slots:
            slot.close()
    return probes, reason


def why_no_more(
    probes: Sequence[Probe], most: int, total_bytes: int | None, together: int | None = None
) -> str | None:
    """Why twice as many slots as in the last probe are not tried; None if they are.

    `together`: so many fit at once, as was found before.
    """
    if not probes:
        return None
    last = probes[-1]
    if together is not None and 2 * last.slots > together:
        return f"more than {together} did not fit before"
    if 2 * last.slots > most:
        return f"{2 * last.slots} would be more than the {most} trials of each executor"
    if len(probes) > 1:
        before = probes[-2]
        gain = last.tokens_per_second / before.tokens_per_second - 1
        if gain < LEAST_GAIN:
            return f"{last.slots} gained {gain:+.0%} over {before.slots}"
        if total_bytes and last.peak_bytes and before.peak_bytes:
            each = (last.peak_bytes - before.peak_bytes) / (last.slots - before.slots)
            predicted = last.peak_bytes + each * last.slots
            if predicted > MOST_MEMORY * total_bytes:
                return (
                    f"{2 * last.slots} would take {predicted / 1e9:.1f} of "
                    f"{total_bytes / 1e9:.1f} GB"
                )
    return None


def chosen(probes: Sequence[Probe]) -> int:
    """The most slots whose doubling paid; 1 without a probe."""
    found = 1
    for before, after in pairwise(probes):
        if after.tokens_per_second < (1 + LEAST_GAIN) * before.tokens_per_second:
            break
        found = after.slots
    return found


def _steps(
    host: Host, slots: Sequence[Slot], count: int, go_on: Callable[[], object]
) -> tuple[float, int]:
    began, tokens = time.monotonic(), 0
    for _ in range(count):
        go_on()
        for outcome in host.step(slots):
            if not isinstance(outcome, StepMetrics):
                raise outcome
            tokens += outcome.tokens
    return time.monotonic() - began, tokens
