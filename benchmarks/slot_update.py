"""The update of packed slots: all at once, against one after another as torch does it.

    python benchmarks/slot_update.py [--matrices 252] [--widths 64,512] [--repetitions 5]

Clipping and AdamW of LoRA adapters of rank 16 on square layers, without a model. `loop` and
`foreach` take the slots one after another, each with `clip_grad_norm_`, a wait for its norm and
torch's AdamW: as it runs on a CPU by default, and as it does on a GPU. `together` is
`packed.update`. The ways are interleaved. Given are medians of the CPU milliseconds of an update,
its calls of torch that are not views, and the kernels that they would launch on a GPU under CUDA
12. Those are computed, from the most tensors and blocks of torch's `MultiTensorApply.cuh` and
`CatArrayBatchedCopy`.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_vlm.packed.update import Flat, Gradients

RANK = 16
LIMIT = 1.0
SLOTS = (1, 2, 4, 8, 16)
MOST_TENSORS, MOST_BLOCKS, BLOCK = (110, 64, 48, 36, 30), 320, 65536
MOST_IN_A_CAT = 128

Adapters = Sequence[torch.optim.AdamW]


def adapters(slots: int, matrices: int, width: int, *, foreach: bool) -> Adapters:
    """An optimizer a slot, over A and B of so many matrices, with gradients."""
    torch.manual_seed(0)
    made = []
    for number in range(slots):
        weights = [
            torch.nn.Parameter(torch.randn(shape))
            for _ in range(matrices)
            for shape in ((RANK, width), (width, RANK))
        ]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        made.append(torch.optim.AdamW(weights, lr=1e-4 * (1 + number), foreach=foreach))
    return made


def one_after_another(slots: Adapters) -> Callable[[], None]:
    """The update as isolated runs do it."""

    def update() -> None:
        for slot in slots:
            norm = torch.nn.utils.clip_grad_norm_(slot.param_groups[0]["params"], LIMIT)
            if math.isfinite(float(norm)):
                slot.step()

    return update


def together(slots: Adapters) -> Callable[[], None]:
    """The update as packed slots have it."""
    flats = [Flat(slot) for slot in slots]

    def update() -> None:
        gradients = Gradients(flats)
        gradients.use([*map(math.isfinite, gradients.norms)], [LIMIT] * len(flats))

    return update


WAYS = {
    "loop": (one_after_another, False),
    "foreach": (one_after_another, True),
    "together": (together, True),
}


class Calls(TorchDispatchMode):
    """Counts calls, and the kernels that they would launch.

    Parameters
    ----------
    slots
        Their numbers of steps stay on the CPU, as they do beside a GPU.
    """

    def __init__(self, slots: Adapters) -> None:
        super().__init__()
        states = [state for slot in slots for state in slot.state.values()]
        self._on_cpu = {state["step"].untyped_storage().data_ptr() for state in states}
        self.calls = self.launches = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view:
            self.calls += 1
            first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            if first.untyped_storage().data_ptr() not in self._on_cpu:
                self.launches += launches(str(function), [*args, found])
        return found


def launches(name: str, values: Sequence[Any]) -> int:
    """Kernels of a call of torch, from what it was given and gave back."""
    lists = [v for v in values if isinstance(v, (list, tuple)) and isinstance(v[0], torch.Tensor)]
    if not lists:
        return 0 if "_local_scalar_dense" in name else 1
    count, blocks = len(lists[0]), sum(-(-tensor.numel() // BLOCK) for tensor in lists[0])
    if "_foreach_" not in name:
        return -(-count // MOST_IN_A_CAT)
    kernels = max(-(-count // MOST_TENSORS[len(lists) - 1]), -(-blocks // MOST_BLOCKS))
    return kernels + ("norm" in name)


@click.command(context_settings={"show_default": True})
@click.option("--matrices", default=252, help="Adapted matrices of a slot.")
@click.option("--widths", default="64,512", help="Of the layers, by comma.")
@click.option("--repetitions", default=5, help="Of every way, interleaved.")
def main(matrices: int, widths: str, repetitions: int) -> None:
    """Print a line for each width and number of slots."""
    torch.set_num_threads(1)
    click.echo(f"{matrices} matrices of rank {RANK}, {psutil.cpu_count()} CPUs, one thread")
    for width in map(int, widths.split(",")):
        for count in SLOTS:
            updates, told = {}, []
            for name, (way, foreach) in WAYS.items():
                slots = adapters(count, matrices, width, foreach=foreach)
                updates[name] = way(slots)
                updates[name]()  # The first one makes the state.
                with Calls(slots) as calls:
                    updates[name]()
                told.append((name, calls.calls, calls.launches))
            seconds: dict[str, list[float]] = {name: [] for name in updates}
            for _ in range(repetitions):
                for name, update in updates.items():
                    began = time.process_time()
                    update()
                    seconds[name].append(time.process_time() - began)
            parts = [
                f"{name} {1e3 * statistics.median(seconds[name]):.1f} ms "
                f"({1e3 * min(seconds[name]):.1f} to {1e3 * max(seconds[name]):.1f}), "
                f"{calls} calls, {kernels} kernels"
                for name, calls, kernels in told
            ]
            load = os.getloadavg()[0]
            click.echo(f"width {width}, {count} slots, load {load:.1f}: " + "; ".join(parts))


if __name__ == "__main__":
    main()
