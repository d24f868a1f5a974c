"""Programs that show a sweep: TensorBoard, MLflow, Weights & Biases.

The driver writes for them from the ledger and the trials' `metrics.jsonl`, in a thread of its own;
workers know nothing of them. Each life of a sweep tells a tracker everything from the beginning,
and the tracker leaves out what it has: so nothing is there twice, and what was missed comes later.
"""

from __future__ import annotations

import importlib

from raytune_vlm.sweep.trackers.base import SweepFacts, Tracker

TRACKERS = {
    "tensorboard": "raytune_vlm.sweep.trackers.tensorboard:TensorBoard",
    "mlflow": "raytune_vlm.sweep.trackers.mlflow:Mlflow",
    "wandb": "raytune_vlm.sweep.trackers.wandb:WeightsAndBiases",
}
"""Name in `report.trackers` -> class; imported only where asked for."""


def open_tracker(name: str, facts: SweepFacts) -> Tracker:
    """The tracker of that name, ready to be told what happens."""
    module, _, cls = TRACKERS[name].partition(":")
    tracker: Tracker = getattr(importlib.import_module(module), cls)(facts)
    return tracker
