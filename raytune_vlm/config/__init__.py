"""The experiment file: typed sections and the loader. Imports neither torch nor ray."""

from raytune_vlm.config.experiment import ExperimentConfig

__all__ = ["ExperimentConfig"]
