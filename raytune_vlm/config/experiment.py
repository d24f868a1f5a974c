"""The whole experiment: one YAML file, resolved and frozen."""

import hashlib
import json
from operator import attrgetter
from typing import Any

from pydantic import Field, model_validator

from raytune_vlm.config.data import DataConfig
from raytune_vlm.config.evaluation import METRIC_MODES, EvaluationConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.config.objectives import COSTS, Objective
from raytune_vlm.config.report import ReportConfig
from raytune_vlm.config.schedulers import FifoScheduler, MedianScheduler, PbtScheduler
from raytune_vlm.config.section import Section
from raytune_vlm.config.sweep import SweepConfig
from raytune_vlm.config.train import WITHOUT_EFFECT, TrainConfig
from raytune_vlm.errors import did_you_mean


class ExperimentConfig(Section):
    """One experiment file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep folder."""
    storage_path: str = "runs"
    """Folder under which sweep folders and the prepared data are kept."""
    storage_copy: str | None = Field(default=None, pattern=r"^[a-z0-9]+://[^/]+")
    """URL under which the sweep folder is copied while it grows: `s3://bucket/prefix`. `raytune-vlm
    resume URL/NAME --into DIR` brings it back, on another machine too. None: no copy."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: adapters, data order, searcher, bootstrap."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig = SweepConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _metric_is_computed(self) -> "ExperimentConfig":
        metric = self.sweep.metric
        if metric is not None and metric not in self.evaluation.metrics:
            raise ValueError(
                f"sweep.metric={metric!r} is not among evaluation.metrics"
                f"{did_you_mean(metric, self.evaluation.metrics)}"
            )
        for number, objective in enumerate(self.sweep.objectives):
            self._check_objective(number, objective)
        return self

    def _check_objective(self, number: int, objective: Objective) -> None:
        place, name = f"sweep.objectives.{number}", objective.metric
        known = [*self.evaluation.metrics, *(COSTS if number else ())]
        if name not in known:
            why = (
                "the first objective picks the winner and must be among evaluation.metrics"
                if name in COSTS
                else "no benchmark of this experiment reports it: it is not among "
                "evaluation.metrics, nor a cost"
            )
            raise ValueError(f"{place}.metric={name!r}: {why}{did_you_mean(name, known)}")
        own = METRIC_MODES.get(name, "min")
        if objective.mode not in (None, own):
            raise ValueError(f"{place}.mode={objective.mode}: of {name} {own} is better")

    @model_validator(mode="after")
    def _budget_is_counted(self) -> "ExperimentConfig":
        sweep, gpus = self.sweep, self.train.gpus_per_worker
        for name in ("max_gpu_hours", "cost_per_gpu_hour"):
            value = getattr(sweep, name)
            if value is not None and gpus == 0:
                raise ValueError(f"sweep.{name}={value} has no effect: train.gpus_per_worker=0")
        return self

    @model_validator(mode="after")
    def _first_rung_is_reached(self) -> "ExperimentConfig":
        scheduler, steps = self.sweep.scheduler, self.train.max_steps
        if not self.sweep.search_space or isinstance(scheduler, FifoScheduler):
            return self
        if self.train.epochs is not None:
            return self  # asked again once the steps are known
        if isinstance(scheduler, PbtScheduler):
            if scheduler.interval >= steps:
                raise ValueError(
                    f"sweep.scheduler.interval={scheduler.interval} must be below train.max_steps="
                    f"{steps}, or no trial is ever replaced"
                )
            return self._own_values_are_multiplied(scheduler)
        if scheduler.grace_period > steps:
            raise ValueError(
                f"sweep.scheduler.grace_period={scheduler.grace_period} must be at most "
                f"train.max_steps={steps}, or no trial is ever stopped early; "
                "lower it or set sweep.scheduler.type to fifo"
            )
        every = self.evaluation.every
        if isinstance(scheduler, MedianScheduler) and (every is None or every >= steps):
            raise ValueError(
                "sweep.scheduler.type=median compares trials wherever they are scored, and with "
                f"evaluation.every={every} that is at their end only: set it below "
                f"train.max_steps={steps}"
            )
        return self

    def _own_values_are_multiplied(self, scheduler: PbtScheduler) -> "ExperimentConfig":
        """A trial with the experiment's own values may become a parent."""
        if self.sweep.include_default or self.sweep.points_to_evaluate:
            for key in scheduler.perturbed:
                if not (own := attrgetter(key)(self)):
                    raise ValueError(
                        f"sweep.scheduler.perturbed: the experiment's own {key}={own} cannot be "
                        "multiplied; give it a value, or set sweep.include_default to false and "
                        "leave out sweep.points_to_evaluate"
                    )
        return self

    @model_validator(mode="after")
    def _samples_fit_into_packs(self) -> "ExperimentConfig":
        pack = self.train.pack_tokens
        if pack is not None and pack < self.data.max_length:
            raise ValueError(
                f"train.pack_tokens={pack} must be at least data.max_length="
                f"{self.data.max_length}: a sample is never divided"
            )
        if pack is not None and self.train.group_by_length:
            raise ValueError(
                "train.pack_tokens and train.group_by_length exclude each other: packs are of "
                "about the same length already"
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

    @model_validator(mode="after")
    def _guard_can_be_read(self) -> "ExperimentConfig":
        names, own = self.evaluation.guard, (".yaml", ".yml")
        on_the_hub = [name for name in names if not name.endswith(own)]
        if on_the_hub and self.evaluation.guard_data is None and not self.data.allow_network:
            raise ValueError(
                f"evaluation.guard={on_the_hub[0]} is on the hub: set data.allow_network=true, or "
                "evaluation.guard_data to a folder that has it"
            )
        return self

    @model_validator(mode="after")
    def _decay_is_used(self) -> "ExperimentConfig":
        searched = self.sweep.search_space.get("train.schedule")
        schedules = [self.train.schedule, *(searched.corners() if searched is not None else ())]
        default = type(self.train).model_fields["decay_share"].default
        if self.train.decay_share != default and "wsd" not in schedules:
            raise ValueError(
                f"train.decay_share={self.train.decay_share} has no effect: "
                f"train.schedule={self.train.schedule}, not wsd"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_asked(self) -> "ExperimentConfig":
        own, key = self.train.distillation, "train.distillation.weight"
        if own.teacher is not None and own.weight == 0 and key not in self.sweep.search_space:
            raise ValueError(f"train.distillation.teacher={own.teacher} has no effect: {key}=0")
        return self

    @model_validator(mode="after")
    def _epochs_are_the_same_steps(self) -> "ExperimentConfig":
        for key in ("train.batch_size", "train.pack_tokens"):
            if self.train.epochs is not None and key in self.sweep.search_space:
                raise ValueError(
                    f"train.epochs={self.train.epochs:g} and sweep.search_space.{key} exclude each "
                    "other: trials are compared after equal numbers of steps; give train.max_steps"
                )
        return self

    @model_validator(mode="after")
    def _recomputed_is_trained(self) -> "ExperimentConfig":
        copied = self._searched_scopes("lora.modules_to_save", self.lora.modules_to_save)
        vision = self.train.activation_checkpointing.vision
        if vision and "vision" not in self.lora_scopes() | copied:
            raise ValueError(
                "train.activation_checkpointing.vision=true has no effect: nothing of the vision "
                f"tower is trained with lora.scope={self.lora.scope}, so nothing of it is kept"
            )
        return self

    @model_validator(mode="after")
    def _backend_fits(self) -> "ExperimentConfig":
        backend, lora, is_cut_up = self.train.backend, self.lora, self.train.holders > 1
        refused = {}
        if backend == "deepspeed" and self.model.dtype == "float16":
            refused["model.dtype=float16"] = "gradients would need DeepSpeed's own loss scale"
        if is_cut_up and self.model.quantization != "none":
            refused[f"model.quantization={self.model.quantization}"] = "4-bit weights stay whole"
        copied = set(lora.full_scopes) - ({"projector"} if backend == "fsdp2" else set())
        if is_cut_up and copied:
            refused[f"lora.modules_to_save={lora.modules_to_save}"] = (
                "a copy of what is cut up cannot be trained"
            )
        if is_cut_up and backend == "deepspeed" and lora.dora:
            refused["lora.dora=true"] = "it reads weights that ZeRO-3 has not gathered"
        for setting, reason in refused.items():
            raise ValueError(
                f"train.backend={backend} and {setting} exclude each other: {reason}; use "
                "train.backend=ddp"
            )
        return self

    @model_validator(mode="after")
    def _slots_fit(self) -> "ExperimentConfig":
        train, slots = self.train, self.sweep.slots
        if slots != 1 and train.backend == "deepspeed":
            raise ValueError(
                f"sweep.slots={slots} and train.backend=deepspeed exclude each other: its engine "
                "is one trial's; use train.backend=fsdp2 or ddp"
            )
        return self

    @model_validator(mode="after")
    def _rung_samples_fit(self) -> "ExperimentConfig":
        shares, rungs = self.evaluation.rung_samples, self.rungs
        if shares is None:
            return self
        shown = list(shares) if isinstance(shares, tuple) else shares
        if len(rungs) == 1:
            raise ValueError(
                f"evaluation.rung_samples={shown} has no effect: the only rung is the last, at "
                f"step {rungs[0]}"
            )
        if isinstance(shares, tuple) and len(shares) != len(rungs) - 1:
            raise ValueError(
                f"evaluation.rung_samples={shown} must have a share for each rung before the last "
                f"({len(rungs) - 1}: steps {', '.join(map(str, rungs[:-1]))})"
            )
        for key in self.sweep.search_space:
            if key == "train.max_steps" or key.startswith(("evaluation.", "sweep.", "data.")):
                raise ValueError(
                    f"evaluation.rung_samples={shown} and sweep.search_space.{key} exclude each "
                    "other: trials must be scored on the same samples at the same steps"
                )
        return self

    def select_share(self, step: int) -> float:
        """The share of `select` that is scored at a step: below 1 only at rungs before the last."""
        shares, rungs = self.evaluation.rung_samples, self.rungs
        if shares is None or step not in rungs[:-1]:
            return 1.0
        return shares[rungs.index(step)] if isinstance(shares, tuple) else shares

    @property
    def metric(self) -> str:
        """The metric variant that decides."""
        if self.sweep.objectives:
            return self.sweep.objectives[0].metric
        return self.sweep.metric or self.evaluation.metrics[0]

    @property
    def mode(self) -> str:
        """`max` or `min`, by the metric."""
        return METRIC_MODES[self.metric]

    @property
    def objectives(self) -> dict[str, str]:
        """What is optimised, the deciding metric first -> `max` or `min`."""
        names = [objective.metric for objective in self.sweep.objectives] or [self.metric]
        return {name: METRIC_MODES.get(name, "min") for name in names}

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
        may be continued with others. Of a model with code of its own the trusted revision counts.
        """
        return fingerprint_of(self.model_dump(mode="json"), self.model.trusted_revision)

    def trusting(self, revision: str | None) -> "ExperimentConfig":
        """A copy whose model may run the code of one revision; see `models/trust.py`."""
        return self.model_copy(update={"model": self.model.trusting(revision)})

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
        changed = ExperimentConfig.model_validate(plain)
        same = (changed.model.name, changed.model.revision) == (
            self.model.name,
            self.model.revision,
        )
        return changed.trusting(self.model.trusted_revision) if same else changed


_NOT_IN_FINGERPRINT: dict[str, Any] = {
    "storage_path": True,
    "storage_copy": True,
    "name": True,
    "report": True,
    "data": dict.fromkeys(
        ("consumption", "tier", "disk_budget_gb", "decode_threads", "stall_timeout_s"), True
    ),
    "train": WITHOUT_EFFECT,
    "sweep": {"max_wait_s": True},
}


def fingerprint_of(plain: dict[str, Any], trusted_code: str | None) -> str:
    """The fingerprint of an experiment as JSON data; see `ExperimentConfig.fingerprint`."""

    def without(value: dict[str, Any], left_out: dict[str, Any]) -> dict[str, Any]:
        return {
            key: without(entry, left_out[key]) if key in left_out else entry
            for key, entry in value.items()
            if left_out.get(key) is not True
        }

    left = without(plain, _NOT_IN_FINGERPRINT)
    return digest_of(left if trusted_code is None else {**left, "trusted_code": trusted_code})


def digest_of(plain: Any) -> str:
    """SHA-256 (first 16 hex digits) of JSON data, independent of key order."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
