"""Whether what a recipe needs is installed; asked before anything is started, without torch."""

from __future__ import annotations

from importlib.util import find_spec

from raytune_vlm.config.sweep import SweepConfig
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ConfigError

OF_SEARCHERS = {"gp": "scipy", "qmc": "scipy", "cmaes": "cmaes"}
"""Searcher -> what it needs that is not installed with this package."""


def check_searcher(config: SweepConfig) -> None:
    """Raise ConfigError if the package of `sweep.searcher` is not installed."""
    name = OF_SEARCHERS.get(config.searcher.type)
    if name is not None and find_spec(name) is None:
        raise ConfigError(
            f"sweep.searcher.type={config.searcher.type} needs {name}: "
            "pip install 'raytune-vlm[searchers]'"
        )


def check_packages(config: TrainConfig) -> None:
    """Raise ConfigError if what `train.backend` needs is not installed."""
    if config.backend == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            "train.backend=deepspeed needs deepspeed: pip install 'raytune-vlm[deepspeed]'"
        )
