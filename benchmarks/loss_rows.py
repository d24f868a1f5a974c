"""Memory and time of the loss: logits of labelled tokens only against logits of all.

    python benchmarks/loss_rows.py [--tokens 512] [--rows 4] [--share 0.25] [--repetitions 5]

A random Qwen2.5-VL of the real class with its vocabulary of 151,936 and little else, LoRA of rank 8
on its language model, rows of text of which the last tokens carry labels. `labelled` is what a step
does (`train.output_layer`), `all` has the logits of every position first and takes the labelled
ones, `model` is the model's own loss. Ways are interleaved, in one process. Bytes are those of
torch's allocator at the peak of forward and backward pass, over what was there before.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy
from train_step import SIZES, write_model

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.models.loading import load_base
from raytune_vlm.models.lora import attach
from raytune_vlm.train.output_layer import TokenLosses

SIZES["vocabulary"] = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "vision_config": {"out_hidden_size": 128},
}


def peak_bytes(step: Callable[[], float]) -> int:
    """Most bytes of the allocator during a step, over what was there before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    now = peak = 0
    events: Any = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@click.command()
@click.option("--rows", default=4, show_default=True)
@click.option("--tokens", default=512, show_default=True, help="Of a row.")
@click.option("--share", default=0.25, show_default=True, help="Of the tokens, with a label.")
@click.option("--repetitions", default=5, show_default=True)
def main(rows: int, tokens: int, share: float, repetitions: int) -> None:
    """Measure in turn; print all figures, medians and ratios to `all`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="raytune_vlm-benchmark-") as folder:
        base = load_base(write_model(Path(folder), "vocabulary"))
    model: Any = attach(base.model, base.family, LoraConfig(rank=8), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(1000, 50_000, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    labels = ids.clone()
    labels[:, : round((1 - share) * tokens)] = -100
    targets = labels[:, 1:]
    count = int((targets != -100).sum())
    token_losses = TokenLosses(model)

    def all_logits() -> torch.Tensor:
        logits = model(**batch).logits[:, :-1][targets != -100]
        return cross_entropy(logits.float(), targets[targets != -100], reduction="sum")

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "labelled": lambda: token_losses(batch, labels, print).sum(),
        "all": all_logits,
        "model": lambda: model(**batch, labels=labels).loss * count,
    }

    def stepped(way: Callable[[], torch.Tensor]) -> float:
        loss = way()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            parameter.grad = None
        return float(loss.detach())

    losses = {name: stepped(way) for name, way in ways.items()}
    peaks = {name: peak_bytes(lambda way=way: stepped(way)) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            began = time.perf_counter()
            stepped(way)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    figures = {
        "labelled tokens": count,
        "tokens": rows * tokens,
        "load": os.getloadavg()[0],
        "loss": losses,
        "peak_bytes": peaks,
        "seconds": seconds,
        "medians": medians,
        "peak_to_all": {name: peak / peaks["all"] for name, peak in peaks.items()},
        "seconds_to_all": {name: found / medians["all"] for name, found in medians.items()},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
