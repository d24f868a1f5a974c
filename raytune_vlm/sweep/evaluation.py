"""One checkpoint's answers to prompts, on every rank of an executor, kept as they come."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from raytune_vlm.config.experiment import digest_of
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.records import BASE_TRIAL, Scores
from raytune_vlm.sweep.asked import asked_of
from raytune_vlm.sweep.jobs import Job

if TYPE_CHECKING:
    import pyarrow as pa

    from raytune_vlm.evaluate.answers import AnswerStore
    from raytune_vlm.evaluate.generate import Prompts, Together
    from raytune_vlm.evaluate.scoring import Prediction
    from raytune_vlm.sweep.worker import Worker

PUSH_EVERY_S = 0.25
"""How often rank 0 of several tells the board where it is."""


class EvaluationStopped(Exception):
    """The job was asked to stop in the middle."""


class Evaluation:
    """One checkpoint on one split: asks the model, and scores what it answers."""

    def __init__(self, worker: Worker, job: Job, model: Any, split: str, step: int) -> None:
        self.worker, self.job, self.split, self.step = worker, job, split, step
        own = job.adapter is None and worker.experiment.with_recipe(job.recipe).lora.leaves_towers
        self._features = worker.features if own else None
        self._model = model
        self._pushed = 0.0
        self.who = job.trial_id
        """What is shown as being scored."""
        self.asked = asked_of(worker, job, split, step)
        self.prompts, self.rows = self.asked.split, self.asked.rows
        self.trial = worker.folder.trial(job.trial_id)
        self.folder = self.trial.evaluation(split, step)
        # Only rank 0 opens the stores, and only it need see the checkpoint.
        self._identity = self._made_with() if worker.world.rank == 0 else {}

    def _made_with(self) -> dict[str, Any]:
        """What the answers depend on, whatever the prompts."""
        from raytune_vlm.models.location import model_fingerprint

        worker, experiment = self.worker, self.worker.experiment
        checkpoint = "none: the base model"
        if self.job.adapter is not None:
            weights = Path(self.job.adapter) / "adapter_model.safetensors"
            checkpoint = hashlib.sha256(weights.read_bytes()).hexdigest()
        elif self.job.trial_id != BASE_TRIAL:
            manifest = self.trial.checkpoint(self.step) / "manifest.json"
            checkpoint = hashlib.sha256(manifest.read_bytes()).hexdigest()
        ids = [self.prompts.sample_ids[row] for row in self.rows]
        return {
            "base": model_fingerprint(experiment.model) | _weights(experiment.model),
            "model": experiment.model.model_dump(mode="json"),
            "checkpoint": checkpoint,
            "data": None if self.asked.facts else worker.setup.data.digest,
            "split": self.split,
            "samples": digest_of(ids),
            "benchmark": self.asked.facts,
            "max_new_tokens": self.asked.evaluation.max_new_tokens,
        }

    def answers(
        self, prompts: Prompts, rows: Sequence[int], folder: Path, made: dict[str, Any], stage: str
    ) -> list[Prediction]:
        """The answers to some rows, in their order, on every rank; those that are there are kept.

        Raises
        ------
        EvaluationStopped
            If the job shall stop.
        """
        from raytune_vlm.evaluate.answers import AnswerStore
        from raytune_vlm.evaluate.generate import deal, generate

        world, config = self.worker.world, self.asked.evaluation
        store = AnswerStore(folder)
        known = self.known(store, made)
        left = [row for row in rows if prompts.sample_ids[row] not in known]
        found: list[Prediction] | None = []
        if left:
            mine = deal(prompts.lengths, left, world.size, config.max_new_tokens)[world.rank]
            together = self.together(prompts)
            if together is not None:
                mine = mine or left[:1]
            found = generate(
                self._model,
                self.worker.base,
                prompts,
                mine,
                config,
                device=world.device,
                keep_going=self.progress(stage, len(rows) - len(left), len(mine)),
                keep=store.writer(world.rank).add,
                together=together,
                features=self._features,
                say=self.worker.note_own,
            )
            if found is None:
                raise EvaluationStopped
        by_id = known | {entry.sample_id: entry for part in world.gather(found) for entry in part}
        return [by_id[prompts.sample_ids[row]] for row in rows]

    def known(self, store: AnswerStore, made: dict[str, Any]) -> dict[str, Prediction]:
        """The answers that a store has of earlier lives, by sample, on every rank."""
        world = self.worker.world
        found = store.open(self._identity | made) if world.rank == 0 else None
        return dict(world.broadcast(found))

    def together(self, prompts: Prompts) -> Together | None:
        """How ranks that hold parts of the model stay in step."""
        from raytune_vlm.evaluate.generate import Together
        from raytune_vlm.prepare.blank import blank_sample

        worker = self.worker
        if worker.world.size == 1 or not worker.backend.is_sharded(worker.experiment.train):
            return None
        blank = blank_sample(worker.base, prompts)
        return Together(lambda count: max(worker.world.gather(count)), blank)

    def progress(self, stage: str, before: int, mine: int) -> Callable[[int], bool]:
        """Tells the board how far this is, on one worker also whether to go on.

        Several ranks have different numbers of batches and cannot ask together: there rank 0 tells
        how far its own share is, and the job is stopped at the next step of training.
        """
        worker, began = self.worker, time.monotonic()
        size = worker.world.size

        def keep_going(done: int) -> bool:
            worker.beat()
            left = seconds_left(began, done, mine)
            where = self.where(stage, before + done * size, before + mine * size, left)
            if size == 1:
                return not worker.told(self.job, **where)
            if worker.world.rank == 0 and time.monotonic() - self._pushed >= PUSH_EVERY_S:
                self._pushed = time.monotonic()
                ray.get(worker.setup.board.push.remote(worker.setup.name, self.job.job_id, where))
            return True

        return keep_going

    def where(self, stage: str, answered: int, asked: int, seconds: float | None) -> dict[str, Any]:
        """What the board is told of how far this is; `seconds`: how long the rest takes."""
        return {
            "trial_id": self.who,
            "stage": stage,
            "step": self.step,
            "answered": answered,
            "asked": asked,
            "seconds_left": seconds,
        }

    def score(
        self,
        predictions: Sequence[Prediction],
        folder: Path,
        seconds: float,
        extracted: dict[str, list[str | None]] | None = None,
    ) -> tuple[Scores, pa.Table]:
        """The scores and their table, on every rank; a judge is asked for what is not given."""
        from raytune_vlm.evaluate.scoring import score

        experiment = self.worker.experiment
        config, facts = self.asked.evaluation, self.asked.facts
        return score(
            predictions,
            trial_id=self.job.trial_id,
            step=self.step,
            split=self.split,
            metrics=self.asked.metrics,
            answer=config.answer,
            confidence=config.confidence,
            num_bootstrap=config.num_bootstrap,
            seed=experiment.seed,
            seconds=seconds,
            overlapping=() if facts else self.worker.folder.overlapping(self.split),
            benchmark=facts,
            extracted=extracted or self._extracted(predictions, folder),
        )

    def _extracted(
        self, predictions: Sequence[Prediction], folder: Path
    ) -> dict[str, list[str | None]]:
        """What the judge extracts, by metric; rank 0 asks."""
        from raytune_vlm.config.evaluation import JUDGED_METRICS
        from raytune_vlm.evaluate.judge import Judge

        world, config = self.worker.world, self.worker.experiment.evaluation
        if config.judge is None:
            return {}
        found = Judge(config.judge, folder).extract(predictions) if world.rank == 0 else None
        return dict.fromkeys(JUDGED_METRICS, world.broadcast(found))


def seconds_left(began: float, done: int, asked: int) -> float | None:
    """How long the rest takes at the pace since a monotonic time; None before the first answer."""
    return (time.monotonic() - began) / done * (asked - done) if done else None


def _weights(config: ModelConfig) -> dict[str, Any]:
    """Sizes and times of the weight files of a model in a local folder."""
    from raytune_vlm.models.location import model_path

    folder = Path(model_path(config))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {"weights": [[x.name, x.stat().st_size, x.stat().st_mtime_ns] for x in files]}
