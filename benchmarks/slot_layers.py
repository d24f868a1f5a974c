"""An adapted layer under packed slots: all adapters in one pass, against one after another.

    python benchmarks/slot_layers.py [--width 1024] [--tokens 16] [--repetitions 9]

Forward and backward pass of LoRA on one square layer, each slot with so many rows of one sequence.
`apart` is PEFT's layer on the rows of each slot in turn, `together` is `packed.routing`; what the
frozen layer takes is in both. Ranks are alike (16), or unlike (8, 16, 64 in turn). Interleaved;
given are medians of the CPU milliseconds of one thread, and the calls of torch that are not views.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_vlm.models.lora import ADAPTER
from raytune_vlm.packed.random import RandomState
from raytune_vlm.packed.routing import Share, routed

SLOTS = (2, 4, 8, 16)
RANKS = {"alike": (16,), "unlike": (8, 16, 64)}


class Calls(TorchDispatchMode):
    """Counts calls of torch that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def ways(
    slots: int, ranks: tuple[int, ...], width: int, tokens: int
) -> dict[str, Callable[[], None]]:
    """Both passes over the same weights and inputs."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(width, width)).requires_grad_(False)
    layers = []
    for number in range(slots):
        config = peft.LoraConfig(r=ranks[number % len(ranks)], target_modules=["0"])
        model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=ADAPTER)
        layers.append(model.get_submodule("base_model.model.0"))
    shares = [
        Share({"0": layer}, slice(number, number + 1), tokens, RandomState("cpu"))
        for number, layer in enumerate(layers)
    ]
    inputs = torch.randn(slots, tokens, width, requires_grad=True)
    gradient = torch.randn(slots, tokens, width)

    def forget() -> None:
        inputs.grad = None
        for layer in layers:
            layer.zero_grad(set_to_none=True)

    def apart() -> None:
        forget()
        torch.cat(
            [layer(inputs[share.rows]) for layer, share in zip(layers, shares, strict=True)]
        ).backward(gradient)

    def together() -> None:
        forget()
        with routed(base, shares):
            base(inputs).backward(gradient)

    return {"apart": apart, "together": together}


@click.command(context_settings={"show_default": True})
@click.option("--width", default=1024, help="Of the layer.")
@click.option("--tokens", default=16, help="Of a slot.")
@click.option("--repetitions", default=9, help="Of every way, interleaved.")
def main(width: int, tokens: int, repetitions: int) -> None:
    """Print a line for each kind of ranks and number of slots."""
    torch.set_num_threads(1)
    for kind, ranks in RANKS.items():
        for slots in SLOTS:
            passes = ways(slots, ranks, width, tokens)
            calls, seconds = {}, {name: [] for name in passes}
            for name, run in passes.items():
                with Calls() as counted:
                    run()
                calls[name] = counted.number
            for _ in range(repetitions):
                for name, run in passes.items():
                    began = time.process_time()
                    run()
                    seconds[name].append(time.process_time() - began)
            told = [
                f"{name} {calls[name]} calls, {1e3 * statistics.median(taken):.2f} ms "
                f"({1e3 * min(taken):.2f} to {1e3 * max(taken):.2f})"
                for name, taken in seconds.items()
            ]
            load = os.getloadavg()[0]
            click.echo(f"ranks {kind}, {slots} slots, load {load:.1f}: " + "; ".join(told))


if __name__ == "__main__":
    main()
