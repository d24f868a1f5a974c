"""Whether what a recipe needs is installed; asked before anything is started, without torch."""

from __future__ import annotations

from importlib.util import find_spec

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ConfigError


def check_packages(config: TrainConfig) -> None:
    """Raise ConfigError if the package of `train.backend` is not installed."""
    if config.backend == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            "train.backend=deepspeed needs deepspeed: pip install 'raytune-vlm[deepspeed]'"
        )
