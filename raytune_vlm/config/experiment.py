"""The whole experiment: one YAML file, resolved and frozen."""

import hashlib
import json
from typing import Any

from pydantic import Field, model_validator

from raytune_vlm.config.data import DataConfig
from raytune_vlm.config.evaluation import METRIC_MODES, EvaluationConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.config.section import Section
from raytune_vlm.config.sweep import AshaScheduler, SweepConfig
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import did_you_mean


class ExperimentConfig(Section):
    """One experiment file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep folder."""
    storage_path: str = "runs"
    """Folder under which sweep folders and the prepared data are kept."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: adapters, data order, searcher, bootstrap."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def _metric_is_computed(self) -> "ExperimentConfig":
        metric = self.sweep.metric
        if metric is not None and metric not in self.evaluation.metrics:
            raise ValueError(
                f"sweep.metric={metric!r} is not among evaluation.metrics"
                f"{did_you_mean(metric, self.evaluation.metrics)}"
            )
        return self

    @model_validator(mode="after")
    def _first_rung_is_reached(self) -> "ExperimentConfig":
        scheduler, steps = self.sweep.scheduler, self.train.max_steps
        if not self.sweep.search_space or not isinstance(scheduler, AshaScheduler):
            return self
        if scheduler.grace_period > steps:
            raise ValueError(
                f"sweep.scheduler.grace_period={scheduler.grace_period} must be at most "
                f"train.max_steps={steps}, or no trial is ever stopped early; "
                "lower it or set sweep.scheduler.type to fifo"
            )
        return self

    @model_validator(mode="after")
    def _scopes_are_trained(self) -> "ExperimentConfig":
        adapted = self.lora_scopes()
        trained = adapted | self._searched_scopes("lora.modules_to_save", self.lora.modules_to_save)
        for section, own, scopes in (
            ("lora.rank_by_scope", self.lora.rank_by_scope, adapted),
            ("train.learning_rate_by_scope", self.train.learning_rate_by_scope, trained),
        ):
            for scope, value in own.model_dump(exclude_none=True).items():
                if scope not in scopes:
                    raise ValueError(
                        f"{section}.{scope}={value} has no effect: {scope!r} is not in "
                        f"lora.scope={self.lora.scope}"
                        + (" nor in lora.modules_to_save" if scopes is trained else "")
                    )
        return self

    @model_validator(mode="after")
    def _quantization_fits(self) -> "ExperimentConfig":
        if self.model.quantization == "none":
            return self
        if self.train.gpus_per_worker == 0:
            raise ValueError(
                f"model.quantization={self.model.quantization} needs a GPU, but "
                "train.gpus_per_worker=0"
            )
        if self.lora.init in ("pissa", "olora"):
            raise ValueError(
                f"lora.init={self.lora.init} and model.quantization={self.model.quantization} "
                "exclude each other: the decomposition needs the weights themselves"
            )
        if "text" in self.lora.full_scopes:
            raise ValueError(
                f"lora.modules_to_save={self.lora.modules_to_save} and model.quantization="
                f"{self.model.quantization} exclude each other: 4-bit weights cannot be trained"
            )
        return self

    @property
    def metric(self) -> str:
        """The metric variant that decides."""
        return self.sweep.metric or self.evaluation.metrics[0]

    @property
    def mode(self) -> str:
        """`max` or `min`, by the metric."""
        return METRIC_MODES[self.metric]

    @property
    def rungs(self) -> tuple[int, ...]:
        """The steps at which a trial of this experiment is scored."""
        return self.sweep.rungs(self.train.max_steps, self.evaluation.every)

    def lora_scopes(self) -> set[str]:
        """Every scope that some trial may adapt."""
        return self._searched_scopes("lora.scope", self.lora.scope)

    def _searched_scopes(self, key: str, own: str | None) -> set[str]:
        searched = self.sweep.search_space.get(key)
        values = [own, *(searched.corners() if searched is not None else ())]
        return {scope for value in values if value is not None for scope in str(value).split("+")}

    def fingerprint(self) -> str:
        """A digest of everything that determines a sweep's results.

        Where it is stored, on how many workers it runs and how its data gets there do not: a run
        may be continued with others.
        """
        plain = self.model_dump(
            mode="json",
            exclude={
                "storage_path": True,
                "name": True,
                "data": {
                    "consumption",
                    "tier",
                    "disk_budget_gb",
                    "decode_threads",
                    "stall_timeout_s",
                },
                "train": {
                    "num_workers",
                    "cpus_per_worker",
                    "micro_batch_size",
                    "micro_batch_tokens",
                    "log_every",
                    "log_samples",
                },
            },
        )
        return digest_of(plain)

    def with_recipe(self, recipe: dict[str, Any]) -> "ExperimentConfig":
        """This experiment with some dotted keys changed; validated anew.

        Raises
        ------
        pydantic.ValidationError
            If a value is not allowed.
        """
        plain: dict[str, Any] = self.model_dump()
        for dotted, value in recipe.items():
            *parents, leaf = dotted.split(".")
            section = plain
            for parent in parents:
                section = section[parent]
            section[leaf] = value
        return ExperimentConfig.model_validate(plain)


def digest_of(plain: Any) -> str:
    """SHA-256 (first 16 hex digits) of JSON data, independent of key order."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
