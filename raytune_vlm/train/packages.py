"""Whether what a recipe needs is installed; asked before anything is started, without torch."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ConfigError


def check_packages(config: TrainConfig) -> None:
    """Raise ConfigError if what `train.backend` or `train.compile` needs is not installed."""
    if config.compile and config.gpus_per_worker == 0:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ConfigError(f"train.compile=true needs a C++ compiler on CPU: no {compiler} here")
    if config.backend == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            "train.backend=deepspeed needs deepspeed: pip install 'raytune-vlm[deepspeed]'"
        )
