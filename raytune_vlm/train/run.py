"""One fine-tuning run: an adapter on a base model, stepped from outside.

The caller owns the loop: `run.step()` does one optimizer step, `run.save()` a checkpoint,
`run.close()` takes the adapter off and leaves the base as it was, ready for the next trial.

    run = Run(base, split, experiment, world, data_digest=digest)
    while run.steps_done < experiment.train.max_steps:
        metrics = run.step()
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.collate.batch import PixelTable
from raytune_vlm.collate.packed import SEGMENTS
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.collate.positions import with_positions
from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.config.train import WITHOUT_EFFECT
from raytune_vlm.errors import CheckpointError, TrialDiverged, TrialInfeasible
from raytune_vlm.models.adapter_file import start_tensors
from raytune_vlm.models.audit import check_merge, check_reload, last_logits
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import attach, detach, trainable_by_scope
from raytune_vlm.prepare.blank import blank_sample
from raytune_vlm.prepare.feed import Arrays, CachedFeed, Collation, Feed, MicroBatch, Part
from raytune_vlm.prepare.plan import Plan, PlanSpec, plan_spec
from raytune_vlm.prepare.store import PreparedSplit
from raytune_vlm.prepare.stream import (
    Augmenting,
    Decoding,
    DecodingFeed,
    StreamSource,
    stored_blocks,
    streamed_blocks,
)
from raytune_vlm.train import checkpoint
from raytune_vlm.train.auditor import Auditor
from raytune_vlm.train.backends import BACKENDS
from raytune_vlm.train.optimizer import parameter_groups
from raytune_vlm.train.schedule import learning_rate
from raytune_vlm.train.world import World

MAX_SKIPPED_STEPS = 3
"""Optimizer steps with a loss or gradient that is not finite before a trial counts as diverged."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Cross-entropy per labelled token of the global batch, in nats."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    learning_rate: float
    """Of what has no rate of its own (`train.learning_rate_by_scope`, `lora.loraplus_ratio`)."""
    labelled_tokens: int
    tokens: int
    """Tokens of the global batch, padding not counted."""
    seconds: float
    skipped: bool
    time: float
    """Unix time at the end of the step."""


@dataclass(frozen=True)
class TrainingData:
    """The prepared data as a run needs to know it."""

    digest: str
    store: str = ""
    index_file: str = ""
    tier: Literal["pixels", "encoded"] = "pixels"


class Run:
    """A trial in training.

    Parameters
    ----------
    base
        The resident base model; its modules are wrapped until `close`.
    split
        The prepared training samples.
    experiment
        The experiment with the trial's recipe applied.
    world
        This worker's place.
    data
        Where the prepared data lies and how it is consumed.
    """

    def __init__(
        self,
        base: Base,
        split: PreparedSplit,
        experiment: ExperimentConfig,
        world: World,
        data: TrainingData,
    ) -> None:
        self.experiment = experiment
        self.config = experiment.train
        self.steps_done = 0
        self.delivered: tuple[int, ...] = ()
        """The rows of the samples that the feed gave this rank in the last step."""
        self._base, self._split, self._world = base, split, world
        backend = BACKENDS[self.config.backend]
        self._pixels = PixelTable(
            base.processor.image_processor, base.family, world.device, backend=base.image_backend
        )
        self._collation = Collation(
            model_type=base.family.model_type,
            pad_token_id=base.processor.tokenizer.pad_token_id,
            micro_batch_size=self.config.micro_batch_size,
            micro_batch_tokens=self.config.micro_batch_tokens,
            rank=world.rank,
            world_size=world.size,
            packed=self.config.pack_tokens is not None,
            pad_to=self.config.pad_to_tokens or 0,
            blank=blank_sample(base, split) if backend.is_sharded(self.config) else None,
        )
        self._skipped = 0
        self._samples_seen = 0
        spec = plan_spec(experiment)
        self.plan = Plan(split.lengths, split.sources, spec, data_digest=data.digest)
        self._feed: Feed = (
            CachedFeed(split, self.plan, self._collation)
            if data.tier == "pixels"
            else self._decoding(spec, data)
        )
        # Last, because from here on the base is wrapped until `close`.
        with self._whole(experiment.lora.reads_weights):
            self.model = attach(base.model, base.family, experiment.lora, seed=experiment.seed)
        self._is_attached = True
        self.trainable = trainable_by_scope(self.model, base.family)
        self.auditor = Auditor(self.model, self.trainable, experiment.lora)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, base.family, experiment),
            weight_decay=self.config.weight_decay,
        )
        self._backend = backend(self.model, optimizer, world, self.config)
        self._optimizer = self._backend.optimizer
        starts = start_tensors(self.model)
        if starts and world.size > 1:
            # A decomposition of the weights may come out with other signs on another machine.
            trained = (p for p in self.model.parameters() if p.requires_grad)
            for tensor in (*trained, *starts):
                torch.distributed.broadcast(tensor.detach(), src=0)
        # Dropout must not depend on how many random numbers the initialisation drew.
        torch.manual_seed(experiment.seed * 1009 + world.rank)

    def _whole(self, needed: bool) -> AbstractContextManager[None]:
        """The base's weights are whole inside, if putting an adapter on reads them."""
        return BACKENDS[self.config.backend].whole(self._base) if needed else nullcontext()

    def _decoding(self, spec: PlanSpec, data: TrainingData) -> DecodingFeed:
        """The feed of the `encoded` tier."""
        config, base, split = self.experiment.data, self._base, self._split
        steps = self.config.max_steps
        if config.consumption == "streaming":
            source = StreamSource(data.store, data.index_file, spec, data.digest, self._collation)
            blocks = streamed_blocks(source, split, steps)
        else:
            blocks = stored_blocks(split, self.plan, self._collation, steps)
        changing = None
        if config.augmentation is not None:
            changing = Augmenting(config.augmentation, self.experiment.seed, split.sample_ids)
        maker = PixelMaker(
            base.processor.image_processor, base.family, base.image_backend, config.image_limits
        )
        return DecodingFeed(
            blocks,
            Decoding(self._collation, maker, changing),
            self.plan,
            split.lengths,
            num_threads=config.decode_threads or max(1, int(self.config.cpus_per_worker)),
            stall_timeout_s=config.stall_timeout_s,
        )

    @property
    def recipe_digest(self) -> str:
        """Digest of what a checkpoint must agree with to be continued."""
        train = self.config.model_dump(exclude={**WITHOUT_EFFECT, "checkpoint_every": True})
        return digest_of({"lora": self.experiment.lora.model_dump(), "train": train})

    def step(self) -> StepMetrics:
        """One optimizer step on the plan's next global batch.

        Raises
        ------
        TrialDiverged
            If the loss or the gradients were not finite more than `MAX_SKIPPED_STEPS` times.
        TrialInfeasible
            If the accelerator is out of memory.
        AuditFailed
            At the first step (with images, if there are any), if the adapter does not train or has
            no effect.
        """
        began = time.monotonic()
        rows = self.plan.rows(self.steps_done)
        labelled = int(self._split.num_labelled[rows].sum())
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps_done, group["peak"])
        self.model.train()
        try:
            micro_batches = self._feed.step(self.steps_done)
            self.delivered = tuple(
                row for entry in micro_batches if entry.counts for row in entry.rows
            )
            loss = self._backward(micro_batches, labelled)
        except torch.OutOfMemoryError as error:
            raise TrialInfeasible(
                f"out of memory at micro_batch_size={self.config.micro_batch_size}: {error}"
            ) from None
        norm = self._backend.clip()
        # A step without images says nothing of a vision tower; unless all are so, wait for one.
        with_images = rows[self._split.num_images[rows] > 0]
        due = self.auditor.is_due and (len(with_images) > 0 or not self._split.num_images.any())
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            if due:
                self._backend.reveal()
                self.auditor.before_update()
            self._backend.step()
        else:
            self._count_skip(loss, norm)
        self._backend.zero_grad()
        self.steps_done += 1
        self._samples_seen += len(rows)
        if due and finite:
            self.auditor.after_update(self._probe(rows))
        return StepMetrics(
            step=self.steps_done,
            loss=loss,
            grad_norm=norm,
            learning_rate=learning_rate(self.config, self.steps_done - 1),
            labelled_tokens=labelled,
            tokens=int(self._split.lengths[rows].sum()),
            seconds=time.monotonic() - began,
            skipped=not finite,
            time=time.time(),
        )

    def _probe(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """A small batch of the rows, of those with images if there are any, without labels."""
        with_images = rows[self._split.num_images[rows] > 0]
        few = tuple(int(row) for row in (with_images if len(with_images) else rows)[:2])
        part = Part(few, tuple(range(len(few))))
        batch = self._collation.collate(part, [self._split.encoded(row) for row in few])
        return self._on_device(batch.arrays)[0]

    def audit_end(self, folder: Path) -> None:
        """The checks of a trial's end, on its last checkpoint; every rank calls it.

        Takes the adapter off, to put the checkpoint's on the bare base: only `close` can follow.

        Raises
        ------
        AuditFailed
            If the checkpoint or the merged adapter answers otherwise than the adapter in memory.
        """
        batch = self._probe(self.plan.rows(self.steps_done - 1))
        expected = last_logits(self.model, batch)
        dtype = self.config.fsdp2.compute_dtype
        found = {"merge": check_merge(self.model, batch, dtype)}
        self._take_off()
        with self._whole(self.experiment.lora.dora):
            found["reload"] = check_reload(self._base.model, folder, batch, expected, dtype)
        self.auditor.end(self._world.broadcast(found))

    def _backward(self, micro_batches: list[MicroBatch], labelled: int) -> float:
        """Accumulate gradients of the global batch's loss; returns that loss, on every rank."""
        total = torch.zeros((), device=self._world.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            batch, labels = self._on_device(micro_batch.arrays)
            summed = summed_cross_entropy(self.model(**batch).logits, labels) / labelled
            self._backend.backward(summed, last=number == len(micro_batches))
            total += summed.detach()
        if self._world.size > 1:
            torch.distributed.all_reduce(total)
        self._backend.add_up()
        return float(total)

    def _on_device(self, arrays: Arrays) -> tuple[dict[str, Any], torch.Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch = {name: tensor.to(self._world.device) for name, tensor in tensors.items()}
        labels = batch.pop("labels")
        batch = self._pixels(batch)
        if SEGMENTS in batch:
            batch = with_positions(self._base.model, batch, self._base.family)
        # A cache costs memory, and hides from transformers that a row is packed.
        return {**batch, "use_cache": False}, labels

    def _count_skip(self, loss: float, norm: float) -> None:
        self._skipped += 1
        if self._skipped > MAX_SKIPPED_STEPS:
            raise TrialDiverged(
                f"loss {loss} and gradient norm {norm} at step {self.steps_done + 1}: "
                f"more than {MAX_SKIPPED_STEPS} steps were not finite"
            )

    def save(self, folder: Path) -> None:
        """Write a checkpoint; every rank calls it, rank 0 writes."""
        self._backend.collect()
        states = self._world.gather(checkpoint.rng_state(self._world.device))
        if self._world.rank == 0:
            state = checkpoint.RunState(
                step=self.steps_done,
                plan_digest=self.plan.digest,
                recipe_digest=self.recipe_digest,
                samples_seen=self._samples_seen,
            )
            checkpoint.save(folder, self.model, self._optimizer, state, states)
        self._world.broadcast(None)  # nobody looks for it before it is there

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises
        ------
        CheckpointError
            If it was made with another recipe or other data.
        """
        state = checkpoint.load(
            folder,
            self.model,
            self._optimizer,
            rank=self._world.rank,
            device=self._world.device,
        )
        for name, ours in (("recipe", self.recipe_digest), ("plan", self.plan.digest)):
            if getattr(state, f"{name}_digest") != ours:
                raise CheckpointError(f"{folder} was made with another {name}")
        self.steps_done, self._samples_seen = state.step, state.samples_seen

    def close(self) -> None:
        """Take the adapter off; the base model is again what it was."""
        try:
            self._feed.close()
        finally:
            self._backend.close()
            self._take_off()

    def _take_off(self) -> None:
        if self._is_attached:
            self._base.model, self._is_attached = detach(self.model), False


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token cross-entropy over labelled positions, in float32.

    Parameters
    ----------
    logits
        `[batch, length, vocabulary]`.
    labels
        int64 `[batch, length]`, not shifted, -100 where there is no loss.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    return cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="sum")
