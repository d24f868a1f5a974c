"""What a tracker is told: the same names of runs, parameters and metrics for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig

Kind = str
"""`train` for the figures of steps, `select` for scores: the first part of a metric's name."""


@dataclass(frozen=True)
class SweepFacts:
    """What does not change over the lives of a sweep."""

    experiment: ExperimentConfig
    folder: Path
    began: float
    """Unix time of the ledger's first event."""

    @property
    def sweep_id(self) -> str:
        """Tells this sweep from others of the same name; stays when its folder is moved."""
        return f"{self.experiment.name}-{round(1000 * self.began)}"

    @property
    def settings(self) -> dict[str, Any]:
        """Every key of the experiment under its dotted name, as in overrides."""
        return _flat(self.experiment.model_dump(mode="json"))

    @property
    def score_names(self) -> list[str]:
        """The names under which scores are logged."""
        return [metric_name("select", name) for name in self.experiment.evaluation.metrics]


class Tracker(ABC):
    """Shows one sweep; it is told everything again in each life of the sweep."""

    @abstractmethod
    def start(self, trial_id: str, recipe: Mapping[str, Any], when: float) -> None:
        """A trial was proposed."""

    @abstractmethod
    def log(
        self, trial_id: str, kind: Kind, step: int, values: Mapping[str, float], when: float
    ) -> None:
        """Figures of a step of a trial; `values` have the names that are shown."""

    @abstractmethod
    def end(self, trial_id: str, status: str, message: str | None, when: float) -> None:
        """A trial is `finished`, `stopped`, `failed` or `infeasible`; nothing more comes of it."""

    @abstractmethod
    def decide(self, values: Mapping[str, float], winner: str, when: float) -> None:
        """The sweep has its winner."""

    @abstractmethod
    def flush(self) -> None:
        """Everything that is known for now was told."""

    @abstractmethod
    def close(self) -> None:
        """This life of the sweep ends, not always the sweep."""


def metric_name(kind: Kind, name: str) -> str:
    """`select`, `nted@donut` -> `select/nted.donut`: the trackers take no @ in a name."""
    return f"{kind}/{name.replace('@', '.')}"


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{before}.{key}" if before else str(key)
        if isinstance(entry, Mapping) and entry:
            found |= _flat(entry, name)
        else:
            found[name] = entry
    return found
