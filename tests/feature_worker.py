"""Another executor on the node of `test_feature_store.py`: three steps with features on disk.

python feature_worker.py JOBS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from made import experiment

from raytune_vlm.collate.feature_store import open_store
from raytune_vlm.collate.features import Features
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import load_base
from raytune_vlm.prepare.store import open_split
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World


def train(jobs: dict[str, Any]) -> dict[str, Any]:
    """Losses of three steps, how many images were computed and read, what was said."""
    base, said = load_base(ModelConfig(name=jobs["model"])), []
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    store = Path(jobs["store"])
    split = open_split(store, store / "index.arrow", "train", maker.decode)
    features = Features(base, "cpu", 1 << 30, said.append)
    features.disk = open_store(Path(jobs["root"]), base, "cpu", 1 << 30, said.append)
    assert features.disk is not None, said
    run = Run(base, split, experiment(), World(), TrainingData("d"), features=features)
    try:
        losses = [run.step().loss for _ in range(3)]
    finally:
        run.close()
    features.disk.flush()
    counts = {"computed": features.computed, "read": features.read}
    return {"losses": losses, "said": said, "folder": str(features.disk.folder), **counts}


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = Path(sys.argv[1])
    jobs.with_name("found.json").write_text(json.dumps(train(json.loads(jobs.read_text()))))
