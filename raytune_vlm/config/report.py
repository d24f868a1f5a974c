"""`report`: where else a sweep is shown, besides its own report page."""

from typing import Literal

from pydantic import field_validator

from raytune_vlm.config.section import Section

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class ReportConfig(Section):
    """Other programs that show the sweep; nothing here changes its results."""

    trackers: tuple[TrackerName, ...] = ()
    """Programs that the driver writes trials, losses and scores for while the sweep runs:
    `tensorboard` into the sweep folder, `mlflow` to MLFLOW_TRACKING_URI (unset: a SQLite file in
    the sweep folder), `wandb` to Weights & Biases (without a key: offline, in the sweep folder)."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        for name in value:
            if value.count(name) > 1:
                raise ValueError(f"{name} is listed {value.count(name)} times")
        return value
