"""One fine-tuning run: an adapter on a base model, stepped from outside.

The caller owns the loop: `run.step()` does one optimizer step, `run.save()` a checkpoint,
`run.close()` takes the adapter off and leaves the base as it was, ready for the next trial.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch

from raytune_vlm.collate.features import Features
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import (
    CheckpointError,
    InfrastructureError,
    TrialDiverged,
    first_line,
)
from raytune_vlm.models.adapter_file import start_tensors
from raytune_vlm.models.adapter_start import start_from
from raytune_vlm.models.audit import check_merge, check_reload, last_logits
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import attach, detach, trainable_by_scope
from raytune_vlm.prepare.feed import MicroBatch, Part
from raytune_vlm.prepare.store import PreparedSplit
from raytune_vlm.train import checkpoint, random_state
from raytune_vlm.train.auditor import Auditor
from raytune_vlm.train.backends import BACKENDS
from raytune_vlm.train.batches import Batches, MicroBatchLimit, TrainingData
from raytune_vlm.train.layers import RecomputedLayers
from raytune_vlm.train.measure import Measure
from raytune_vlm.train.memory import infeasible_without_memory
from raytune_vlm.train.objective import Teacher, objective
from raytune_vlm.train.optimizer import parameter_groups
from raytune_vlm.train.schedule import learning_rate
from raytune_vlm.train.step_metrics import StepMetrics, Sums
from raytune_vlm.train.world import World

MAX_SKIPPED_STEPS = 3
"""Optimizer steps with a loss or gradient that is not finite before a trial counts as diverged."""

__all__ = ["MAX_SKIPPED_STEPS", "Run", "StepMetrics", "TrainingData"]


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
    limit_file
        Where a smaller micro-batch is kept for the next life of this trial; None: nowhere.
    features
        What the base's tower and projector make of images, if nothing of them is trained.
    teacher
        The model of `train.distillation`, where the recipe asks one.
    """

    def __init__(
        self,
        base: Base,
        split: PreparedSplit,
        experiment: ExperimentConfig,
        world: World,
        data: TrainingData,
        *,
        limit_file: Path | None = None,
        features: Features | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.experiment = experiment
        self.config = experiment.train
        self.recipe_digest = checkpoint.recipe_digest(experiment)
        self.steps_done = 0
        self.delivered: tuple[int, ...] = ()
        """The rows of the samples that the feed gave this rank in the last step."""
        self._base, self._split, self._world = base, split, world
        backend = BACKENDS[self.config.backend]
        self._is_sharded = backend.is_sharded(self.config)
        self._skipped = self._overflowed = 0
        self._samples_seen = 0
        self.batches = Batches(
            base,
            split,
            experiment,
            world,
            data,
            sharded=self._is_sharded,
            limit_file=limit_file,
            features=features if experiment.lora.leaves_towers else None,
        )
        self.plan = self.batches.plan
        # Last, because from here on the base is wrapped until `close`.
        with self._whole(experiment.lora.reads_weights):
            self.model = attach(base.model, base.family, experiment.lora, seed=experiment.seed)
        self.is_attached = True
        """Whether the adapter is on the base, or parked beside it (`packed.slot`)."""
        with ExitStack() as undo:
            undo.callback(self._detach)
            self.layers = RecomputedLayers(self.model, base.family, self.config)
            undo.callback(self.layers.restore)
            self.layers.change()
            self.measure = Measure(self.model, base.family, split, world)
            undo.callback(self.measure.close)
            self.trainable = trainable_by_scope(self.model, base.family)
            self.auditor = Auditor(self.model, self.trainable, experiment.lora)
            self._objective = objective(
                self.model, self.config, teacher, self.batches, self.auditor
            )
            groups = parameter_groups(self.model, base.family, experiment)
            optimizer = torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)
            self._backend = backend(self.model, optimizer, world, self.config)
            self._undo = undo.pop_all()
        self.optimizer = self._backend.optimizer
        """AdamW over all that is trained; `begin` sets the learning rates of its groups."""
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        if starts := start_tensors(self.model):  # elsewhere singular vectors have other signs
            world.align([*self._trained, *starts])
        # Dropout must not depend on how many random numbers the initialisation drew.
        random_state.seed(experiment.seed * 1009 + world.rank)

    def _whole(self, needed: bool) -> AbstractContextManager[None]:
        """The base's weights are whole inside, if putting an adapter on reads them."""
        return BACKENDS[self.config.backend].whole(self._base) if needed else nullcontext()

    def step(self) -> StepMetrics:
        """One optimizer step on the plan's next global batch.

        Raises
        ------
        TrialDiverged
            If the loss or the gradients were not finite more than `MAX_SKIPPED_STEPS` times.
        TrialInfeasible
            If memory does not suffice for a single row, or for the update.
        InfrastructureError
            If a rank of a sharded base ran out of memory: the others wait for it inside the model,
            so all have to start again, with smaller micro-batches.
        AuditFailed
            At the first step (with images, if there are any), if the adapter does not train or has
            no effect.
        """
        began = time.monotonic()
        return self.finish(self._backward(self.begin()), began)

    def begin(self) -> int:
        """Make ready for the plan's next global batch; returns how many labels it has."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps_done, group["peak"])
        self.model.train()
        return int(self._split.num_labelled[self.plan.rows(self.steps_done)].sum())

    def finish(self, sums: Sums, began: float) -> StepMetrics:
        """Use the gradients; `began` is the monotonic time of `begin`. See `step`."""
        with infeasible_without_memory(self.steps_done + 1):
            norm = self._backend.clip()
            usable = self.judge(sums, norm)
            if usable:
                self._backend.step()
            return self.conclude(sums, norm, began, updated=usable)

    def judge(self, sums: Sums, norm: float) -> bool:
        """Whether to use the gradients, of this norm; audits them first where that is due."""
        rows = self.plan.rows(self.steps_done)
        if math.isfinite(sums.loss) and math.isfinite(norm):
            # A step without images says nothing of a vision tower; unless all are so, wait for one.
            images = self._split.num_images
            if self.auditor.is_due and (images[rows].any() or not images.any()):
                self._backend.reveal()
                self.auditor.before_update()
            return True
        if self._backend.skip() and math.isfinite(sums.loss):
            self._overflowed += 1
        else:
            self._count_skip(rows, sums.loss, norm)
        return False

    def conclude(self, sums: Sums, norm: float, began: float, *, updated: bool) -> StepMetrics:
        """Go on to the next step, after an update or without; audits the effects of the first."""
        rows = self.plan.rows(self.steps_done)
        self._backend.zero_grad()
        self.steps_done += 1
        self._samples_seen += len(rows)
        if self.auditor.awaits_update:
            self.auditor.after_update(self._probe(rows))
        return self.measure.metrics(
            rows,
            sums,
            time.monotonic() - began,
            step=self.steps_done,
            loss=sums.loss,
            grad_norm=norm,
            learning_rate=learning_rate(self.config, self.steps_done - 1),
            skipped=not updated,
            skipped_steps=self._skipped,
            overflowed_steps=self._overflowed,
            micro_batch_size=self.batches.limit.size,
            **self._objective.told(sums),
        )

    def _probe(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """A small batch of the rows, of those with images if there are any, without labels."""
        with_images = rows[self._split.num_images[rows] > 0]
        few = tuple(int(row) for row in (with_images if len(with_images) else rows)[:2])
        part = Part(few, tuple(range(len(few))))
        batch = self.batches.collation.collate(part, [self._split.encoded(row) for row in few])
        return self.batches.with_pixels(batch.arrays, few)

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
        self._undo.close()
        with self._whole(self.experiment.lora.dora):
            found["reload"] = check_reload(self._base.model, folder, batch, expected, dtype)
        self.auditor.end(self._world.broadcast(found))

    def _backward(self, labelled: int) -> Sums:
        """Accumulate gradients of the global batch's loss, in micro-batches that memory holds.

        Returns the sums over all ranks; the gradients are those of all ranks too.
        """
        drawn = random_state.capture(self._world.device)
        while True:
            mine, failure = self._forward_and_backward(labelled)
            sums = mine.over_ranks(self._world)
            if not sums.out_of_memory:
                self._backend.add_up()
                return sums
            self._backend.zero_grad()
            self._shrink(failure or "on another worker")
            random_state.restore(drawn, self._world.device)

    def _forward_and_backward(self, labelled: int) -> tuple[Sums, str | None]:
        """This rank's sums, and why it ran out of memory if it did.

        Ranks do not wait for each other in here, unless the base is sharded.
        """
        sums, failure = Sums(), None
        total = torch.zeros(self._objective.num_parts, device=self._world.device)
        try:
            micro_batches = self.micro_batches(sums)
            for number, micro_batch in enumerate(micro_batches, start=1):
                batch, labels = self.batches.on_device(micro_batch.arrays, micro_batch.rows)
                self.measure.forward_begins()
                parts = self._objective(batch, labels, micro_batch) / labelled
                self.measure.forward_ends(sums, micro_batch.arrays["labels"].size)
                self._backend.backward(parts[0], last=number == len(micro_batches))
                total += parts.detach()
            self._objective.note(sums, total.tolist())
        except torch.OutOfMemoryError as error:
            failure, sums.out_of_memory = first_line(error), 1.0
        if failure is not None and self._is_sharded:
            self._leave(failure)
        return sums, failure

    def micro_batches(self, sums: Sums) -> list[MicroBatch]:
        """This rank's part of the global batch; the time of waiting goes into the sums."""
        began = time.monotonic()
        found = self.batches.step(self.steps_done)
        sums.waited = time.monotonic() - began
        self.delivered = tuple(row for entry in found if entry.counts for row in entry.rows)
        return found

    def forget_gradients(self) -> None:
        """As if the step had not begun."""
        self._backend.zero_grad()

    def _shrink(self, failure: str) -> None:
        """Halve the micro-batch, the same on every rank."""
        before, limit = self.batches.limit, self.batches.halved(self.steps_done)
        torch.cuda.empty_cache()
        self.batches.lower(limit)
        if self._world.rank == 0:
            self.batches.remember(limit)
        self.auditor.notes.append(
            f"step {self.steps_done + 1}: out of memory: micro-batch {before} -> "
            f"{limit}, at the same batch_size ({failure})"
        )

    def _leave(self, failure: str) -> None:
        """End this life of the trial: the other ranks wait inside the model."""
        limit = self.batches.halved(self.steps_done)
        self.batches.remember(limit)
        raise InfrastructureError(
            f"out of memory on rank {self._world.rank} at step {self.steps_done + 1} with backend="
            f"{self.config.backend}: the trial starts again with micro-batch {limit} "
            f"({failure})"
        )

    def _count_skip(self, rows: np.ndarray, loss: float, norm: float) -> None:
        self._skipped += 1
        what = (
            f"step {self.steps_done + 1}: loss {loss} and gradient norm {norm}, samples "
            f"{self.batches.named(rows)}"
        )
        if self._skipped > MAX_SKIPPED_STEPS:
            raise TrialDiverged(f"more than {MAX_SKIPPED_STEPS} steps were not finite; {what}")
        self.auditor.notes.append(f"no update at {what}")

    def save(self, folder: Path) -> None:
        """Write a checkpoint; every rank calls it, rank 0 writes.

        Raises
        ------
        CheckpointError
            On every rank, if it cannot be written.
        """
        self._backend.collect()
        states = self._world.gather(random_state.capture(self._world.device))
        failure = None
        if self._world.rank == 0:
            state = checkpoint.RunState(
                step=self.steps_done,
                plan_digest=self.plan.digest,
                recipe_digest=self.recipe_digest,
                samples_seen=self._samples_seen,
                skipped_steps=self._skipped,
                overflowed_steps=self._overflowed,
                micro_batch=self.batches.lowered_as_json,
                scaler=self._backend.scaler_state(),
            )
            try:
                checkpoint.save(folder, self.model, self.optimizer, state, states)
            except CheckpointError as error:
                failure = error
        # Nobody looks for it before it is there.
        failure = self._world.broadcast(failure)
        if failure is not None:
            raise failure

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
            self.optimizer,
            rank=self._world.rank,
            device=self._world.device,
        )
        for name, ours in (("recipe", self.recipe_digest), ("plan", self.plan.digest)):
            if getattr(state, f"{name}_digest") != ours:
                raise CheckpointError(f"{folder} was made with another {name}")
        self.steps_done, self._samples_seen = state.step, state.samples_seen
        self._skipped, self._overflowed = state.skipped_steps, state.overflowed_steps
        self._backend.restore_scaler(state.scaler)
        if state.micro_batch is not None:
            self.batches.lower(MicroBatchLimit(**state.micro_batch))

    def start_from(self, folder: Path, before: ExperimentConfig, step: int) -> list[str]:
        """Go on at a step from another recipe's adapter, optimizer fresh; what was changed."""
        told = start_from(folder, self.model, self._base.family, before.lora, self.experiment.lora)
        self._world.align(self._trained)
        self.steps_done = step
        return told

    def close(self) -> None:
        """Take the adapter off; the base model is again what it was."""
        try:
            self.batches.close()
        finally:
            self._backend.close()
            self._undo.close()

    def _detach(self) -> None:
        self._base.model, self.is_attached = detach(self.model), False
