"""The sweep that every fault strikes: tiny, yet with rungs, promotions, replicates and a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from made import write_data

from raytune_vlm.models.tiny import write_tiny_model

NUM_TRIALS = 4
RUNGS = (4, 8)
TRAIN_SAMPLES = 10


def write_inputs(folder: Path) -> None:
    """The data and the model that all sweeps below a folder share."""
    write_data(folder / "data", num_train=TRAIN_SAMPLES, num_other=4)
    write_tiny_model("idefics3", folder / "model")


def write_sweep(inputs: Path, storage: Path, name: str, **changes: Any) -> Path:
    """The experiment file of a sweep in a storage folder; `changes` are dotted keys."""
    plain: dict[str, Any] = {
        "name": name,
        "storage_path": str(storage),
        "model": {"name": str(inputs / "model")},
        "data": {
            "root": str(inputs / "data"),
            "sources": [
                {"type": "messages", "path": f"{split}.jsonl", "split": split}
                for split in ("train", "select", "report")
            ],
        },
        "lora": {"dropout": 0.1},
        "train": {
            "max_steps": RUNGS[-1],
            "warmup_steps": 2,
            "batch_size": 4,
            "micro_batch_size": 2,
            "checkpoint_every": 2,
            "keep_checkpoints": 4,
            "log_every": 1,
            "log_samples": True,
            "grace_s": 20,
        },
        "evaluation": {
            "metrics": ["cer@micro", "exact_match@strip"],
            "max_new_tokens": 4,
            "batch_size": 2,
            "num_bootstrap": 100,
        },
        "sweep": {
            "num_trials": NUM_TRIALS,
            "num_replicates": 1,
            "scheduler": {"type": "halving", "grace_period": RUNGS[0], "reduction_factor": 2},
            "search_space": {
                "lora.rank": {"type": "choice", "values": [2, 4]},
                "train.learning_rate": {"type": "loguniform", "lower": 1e-3, "upper": 1e-1},
            },
        },
    }
    for key, value in changes.items():
        section, _, last = key.partition(".")
        plain[section][last] = value
    file = storage / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    return file
