"""What executors are asked to do: plain data, free of Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from raytune_vlm.config.evaluation import EvaluationConfig


@dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark as the executors score it: prepared data and how it is asked."""

    name: str
    """Under which its scores are stored: `docvqa`, `chartqa-human-limit-200`."""
    store: str
    index_file: str
    limit: int | None
    """At most so many questions, always the same ones."""
    evaluation: EvaluationConfig
    """How it is generated and what counts as parsed; its `metrics` are not read."""
    metrics: tuple[str, ...]
    """Empty where the answers are secret."""
    facts: dict[str, Any]
    """What is kept beside the scores."""


@dataclass(frozen=True)
class Job:
    """One piece of work for an executor.

    Attributes
    ----------
    job_id
        Unique in a sweep.
    kind
        `trial`: train a recipe and score it at every rung; `evaluate`: score one checkpoint (or
        the base model) on one split; `plan`: find out how many slots pay.
    trial_id
        Whose folder the results go to.
    recipe
        Dotted keys of the experiment that differ.
    reported
        Steps whose scores the ledger has already: not to be reported again.
    until
        The rung at which a trial's job ends, to be put up again if the trial is promoted; None: the
        last one.
    origin
        Of a clone: `parent`, `step` and the parent's `recipe`.
    split, step
        For `evaluate`: what to score, and which checkpoint (0 is the base model).
    benchmark
        For `evaluate`: the benchmark to score instead of a split of the experiment's own data.
    adapter
        For `evaluate`: the folder of a PEFT adapter to put on, instead of a trial's checkpoint.
    others
        For `evaluate`: jobs that score other checkpoints on the same prompts, asked in the same
        batches where their adapters allow it.
    attempt
        Counts from 1; grows each time an executor died with the job.
    """

    job_id: str
    kind: Literal["trial", "evaluate", "plan"]
    trial_id: str
    recipe: dict[str, Any]
    reported: tuple[int, ...] = ()
    until: int | None = None
    origin: dict[str, Any] | None = None
    split: str = "select"
    step: int = 0
    attempt: int = 1
    benchmark: PreparedBenchmark | None = None
    adapter: str | None = None
    others: tuple[Job, ...] = ()
