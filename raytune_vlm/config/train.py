"""`train`: the recipe of one fine-tuning run and the workers that carry it out."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from raytune_vlm.config.distillation import DistillationConfig
from raytune_vlm.config.section import Section

LEAST_SHARE = 0.0001
"""Of a CPU or a GPU."""

WITHOUT_EFFECT: dict[str, Any] = {
    "deepspeed": True,
    "fsdp2": {"shard_size": True},
    "distillation": {"chunk_tokens": True},
    "backend": True,
    "num_workers": True,
    "cpus_per_worker": True,
    "micro_batch_size": True,
    "micro_batch_tokens": True,
    "pad_to_tokens": True,
    "activation_checkpointing": True,
    "log_every": True,
    "log_samples": True,
    "keep_best": True,
    "hang_timeout_s": True,
    "feature_cache_gb": True,
    "feature_disk_gb": True,
    "feature_disk_folder": True,
    "grace_s": True,
}
"""Keys of `train` that results do not depend on, as pydantic's `exclude` takes them: a run may be
continued with others."""


class LearningRateByScope(Section):
    """Peak learning rates of single scopes; a scope without one has `train.learning_rate`."""

    text: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate of the language model."""
    projector: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate of what lies between vision tower and language model."""
    vision: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate of the vision tower."""


class ActivationCheckpointing(Section):
    """Scopes whose layers are computed again in the backward pass instead of kept in memory."""

    text: bool = False
    """The language model's layers: less memory, about a third more compute of theirs."""
    vision: bool = False
    """The vision tower's layers; of use where something in the tower is trained."""


class Fsdp2Config(Section):
    """How `train.backend: fsdp2` cuts up the frozen base model."""

    shard_size: int | None = Field(default=None, ge=2)
    """Workers that hold one copy of the base together; `num_workers` is a multiple of it. Fewer
    than all: every group of them holds a copy and gathers layers within itself (hybrid sharding),
    for groups that are better connected inside than to each other. None: all workers hold one."""
    compute_dtype: Literal["bfloat16", "float16"] | None = None
    """What the base computes in, whatever it is stored in; the adapter stays float32. None: as
    stored."""


class DeepSpeedConfig(Section):
    """What `train.backend: deepspeed` divides among the workers; results do not depend on it."""

    stage: Literal[1, 2, 3] = 3
    """Stage of ZeRO. 1: the moments of AdamW and a second copy of what is trained; 2: its gradients
    too; 3: the frozen base model too."""
    offload_optimizer: bool = False
    """Keep what stage 1 divides in the host's memory and update it there."""


class TrainConfig(Section):
    """One run: what the optimizer does and on how many workers."""

    max_steps: int = Field(default=200, ge=1)
    """Optimizer steps of a complete run."""
    epochs: float | None = Field(default=None, gt=0, le=10_000)
    """Passes over the training samples of a complete run, instead of `max_steps`: so many steps
    that every sample (or pack, as the plan makes them) was used so often. Known once the data is
    prepared; rungs, schedule and warm-up follow."""
    batch_size: int = Field(default=16, ge=1)
    """Samples per optimizer step, over all workers."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Samples per forward pass on one worker; the loss does not depend on it."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a forward pass on one worker, padding included; None: no limit beside
    `micro_batch_size`."""
    group_by_length: bool = False
    """Put samples of about the same length into one step: less padding, a less random order."""
    pack_tokens: int | None = Field(default=None, ge=1)
    """Put samples together into rows of at most this many tokens, none of which sees another;
    `batch_size` and `micro_batch_size` then count rows. None: every sample has its own."""
    pad_to_tokens: int | None = Field(default=None, ge=1)
    """Pad every forward pass to at least this many tokens, so that its shape does not change; None
    pads to the longest row."""
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    """Peak learning rate of AdamW."""
    learning_rate_by_scope: LearningRateByScope = LearningRateByScope()
    """Other peaks for single scopes, over the same schedule: `learning_rate_by_scope: {vision:
    2e-5}`."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How the learning rate goes on after the warm-up; all but `constant` end at zero. `wsd`:
    constant, then linear over the last `decay_share` of the steps."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of `max_steps` over which `wsd` (warm-up, stable, decay; Hu et al. 2024) decays."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps over which the learning rate rises from zero."""
    warmup_share: float | None = Field(default=None, ge=0, lt=1)
    """The same as a share of the steps of a complete run, instead of `warmup_steps`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger global norm are scaled down to it."""
    distillation: DistillationConfig = DistillationConfig()
    """A teacher beside the labels: `distillation: {teacher: ORG/LARGER-MODEL, weight: 0.5}`."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    """Where activations are recomputed: `activation_checkpointing: {text: true}`. Results are the
    same, bit for bit on CPU."""
    backend: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """How workers share the frozen base model: each holds all of it (`ddp`), or each a part, by
    `fully_shard` (`fsdp2`) or ZeRO (`deepspeed`). Adapters are megabytes: they are whole on every
    worker, in every checkpoint, and results do not depend on the backend."""
    fsdp2: Fsdp2Config = Fsdp2Config()
    """Of `backend: fsdp2`."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Of `backend: deepspeed`."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers of one executor."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for a worker; torch uses as many threads."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for a worker; 0 trains on CPU with gloo."""
    log_every: int = Field(default=5, ge=1)
    """Steps between two lines of metrics.jsonl."""
    log_samples: bool = False
    """Write which samples each worker was given in each step to the trial's `samples/`."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints, besides those at every rung and at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept per trial, the newest first, besides the best-scored ones."""
    keep_best: int = Field(default=1, ge=1)
    """Best-scored checkpoints kept per trial, besides the newest."""
    feature_cache_gb: float = Field(default=1.0, ge=0)
    """Memory of each executor, in 10^9 bytes, for what a frozen vision tower and projector make of
    images: computed once an image, for all steps, trials and evaluations. The least recently used
    are dropped. 0: computed in every pass. Trials that train any of it never use it. A teacher's
    are kept too (`distillation`): each gets half."""
    feature_disk_gb: float = Field(default=0.0, ge=0)
    """Disk of each node, in 10^9 bytes, for the same, beyond `feature_cache_gb`: shared by the
    node's executors, by later sweeps of the same model and by resumes. The longest unused make room
    for others. 0: in memory only."""
    feature_disk_folder: str | None = None
    """Folder for them on a disk of each node's own, as an absolute path; may be deleted at any
    time. None: `features` beside the prepared data, where that is no network's file system."""
    hang_timeout_s: float = Field(default=1800, ge=1, le=7 * 86400)
    """Seconds without a step (or a batch of answers) after which a worker writes the stacks of its
    threads and is started again; four times as much until the first step of a trial is done."""
    grace_s: float = Field(default=60, ge=0, le=3600)
    """Seconds that executors get to save where they are when the run is stopped."""

    @model_validator(mode="after")
    def _ray_counts_resources(self) -> "TrainConfig":
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} must be a whole number, or below 1: a "
                "part of a GPU is of one GPU"
            )
        for name in ("cpus_per_worker", "gpus_per_worker"):
            if 0 < getattr(self, name) < LEAST_SHARE:
                least = f"the least that Ray counts is {LEAST_SHARE:g}"
                raise ValueError(f"{name}={getattr(self, name):g} is too little: {least}")
        return self

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.batch_size < self.num_workers:
            raise ValueError(
                f"batch_size={self.batch_size} must be at least num_workers={self.num_workers}"
            )
        if self.backend != "ddp" and self.num_workers == 1:
            raise ValueError(
                f"backend={self.backend} has no effect with num_workers=1: it cuts the model up "
                "among workers; use ddp, or more workers"
            )
        size = self.fsdp2.shard_size
        if size is not None and self.num_workers % size:
            raise ValueError(f"fsdp2.shard_size={size} must divide num_workers={self.num_workers}")
        for own, other in (("epochs", "max_steps"), ("warmup_share", "warmup_steps")):
            given = getattr(self, other) != type(self).model_fields[other].default
            if getattr(self, own) is not None and given:
                raise ValueError(
                    f"{own}={getattr(self, own):g} and {other}={getattr(self, other)} exclude each "
                    "other: give one of the two"
                )
        if self.epochs is None and self.warmup >= self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup} must be below max_steps={self.max_steps}")
        return self

    @model_validator(mode="after")
    def _teacher_is_whole(self) -> "TrainConfig":
        teacher = self.distillation.teacher
        if teacher is not None and self.holders > 1:
            raise ValueError(
                f"distillation.teacher={teacher} and backend={self.backend} exclude each other: "
                "output layers are used in chunks and have to be whole; use backend: ddp"
            )
        return self

    @model_validator(mode="after")
    def _features_are_used(self) -> "TrainConfig":
        size, folder = self.feature_disk_gb, self.feature_disk_folder
        if size and not self.feature_cache_gb:
            raise ValueError(f"feature_disk_gb={size:g} has no effect with feature_cache_gb=0")
        if size and self.holders > 1:
            raise ValueError(
                f"feature_disk_gb={size:g} has no effect with backend={self.backend}: features are "
                "kept where every worker holds all of the base model"
            )
        if folder is not None and not size:
            raise ValueError(f"feature_disk_folder={folder} has no effect with feature_disk_gb=0")
        if folder is not None and not Path(folder).is_absolute():
            raise ValueError(
                f"feature_disk_folder={folder} must be an absolute path: it is one of each node"
            )
        return self

    @model_validator(mode="after")
    def _sections_are_used(self) -> "TrainConfig":
        for backend, section in (("fsdp2", self.fsdp2), ("deepspeed", self.deepspeed)):
            changed = section.model_dump(exclude_defaults=True)
            if self.backend != backend and changed:
                key, value = next(iter(changed.items()))
                raise ValueError(
                    f"{backend}.{key}={value} has no effect with backend={self.backend}; "
                    f"set backend: {backend}"
                )
        return self

    @property
    def warmup(self) -> int:
        """Steps of the warm-up."""
        if self.warmup_share is None:
            return self.warmup_steps
        return round(self.warmup_share * self.max_steps)

    def feature_folder(self, store: str) -> Path:
        """The folder for features on disk, given that of the prepared data."""
        return Path(self.feature_disk_folder or Path(store) / "features")

    @property
    def holders(self) -> int:
        """Workers that hold one copy of the base model together."""
        if self.backend == "fsdp2":
            return self.fsdp2.shard_size or self.num_workers
        return self.num_workers if self.backend == "deepspeed" and self.deepspeed.stage == 3 else 1

    def peak_of(self, scope: str) -> float:
        """The peak learning rate of a scope."""
        own: float | None = getattr(self.learning_rate_by_scope, scope)
        return self.learning_rate if own is None else own
