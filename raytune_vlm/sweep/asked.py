"""What a job asks a worker's model: a split of the experiment's own data, or a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.rungs import rows_to_score

if TYPE_CHECKING:
    from raytune_vlm.prepare.store import PreparedSplit
    from raytune_vlm.sweep.worker import Worker


@dataclass(frozen=True)
class Asked:
    """Prompts, which rows of them, and how the answers are made and scored."""

    split: PreparedSplit
    rows: list[int]
    evaluation: EvaluationConfig
    metrics: tuple[str, ...]
    facts: dict[str, Any] | None


def asked_of(worker: Worker, job: Job, split: str, step: int) -> Asked:
    """The prompts of a job on a worker; those of a benchmark are opened, not copied."""
    from raytune_vlm.collate.pixels import PixelMaker
    from raytune_vlm.prepare.store import open_split

    benchmark = job.benchmark
    if benchmark is None:
        own = worker.experiment.evaluation
        prompts = worker.splits[split]
        rows = rows_to_score(worker.experiment, prompts, worker.rows[split], step)
        return Asked(prompts, rows, own, own.metrics, None)
    maker = PixelMaker(
        worker.base.processor.image_processor,
        worker.base.family,
        worker.base.image_backend,
        worker.experiment.data.image_limits,
    )
    prompts = open_split(benchmark.store, benchmark.index_file, "report", maker.decode)
    rows = prompts.fixed_choice(benchmark.limit)
    return Asked(prompts, rows, benchmark.evaluation, benchmark.metrics, benchmark.facts)
