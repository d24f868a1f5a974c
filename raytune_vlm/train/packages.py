"""Whether what a recipe needs is installed; asked before anything is started, without torch."""

from __future__ import annotations

from importlib.util import find_spec

from raytune_vlm.config.report import ReportConfig
from raytune_vlm.config.sweep import SweepConfig
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ConfigError

OF_SEARCHERS = {"gp": "scipy", "qmc": "scipy", "cmaes": "cmaes"}
"""Searcher -> what it needs that is not installed with this package."""

OF_TRACKERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""Tracker -> what writes for it; tensorboardX comes with Ray Tune."""


def check_trackers(config: ReportConfig) -> None:
    """Raise ConfigError if the package of one of `report.trackers` is not installed."""
    for name in config.trackers:
        if find_spec(OF_TRACKERS[name]) is None:
            raise ConfigError(
                f"report.trackers: {name} needs {OF_TRACKERS[name]}: "
                "pip install 'raytune-vlm[trackers]'"
            )


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
