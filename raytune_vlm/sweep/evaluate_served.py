"""`evaluate --server`: a model behind a server, on benchmarks or on a split of a sweep folder.

No executor is started and no weights are loaded here: the questions are read from the prepared
store, as executors read them, and asked in threads of this process. Answers are kept as they come;
called again, only what is missing is asked.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.config.evaluation import JUDGED_METRICS, EvaluationConfig
from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.config.server import ServedModel
from raytune_vlm.evaluate.answers import AnswerStore
from raytune_vlm.evaluate.judge import Judge
from raytune_vlm.evaluate.scoring import Prediction, score, write_evaluation
from raytune_vlm.evaluate.served import Served
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.store import PreparedSplit, open_split
from raytune_vlm.records import Scores, SweepFolder, read_json
from raytune_vlm.sweep import preparing, runner
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.lease import Lease
from raytune_vlm.sweep.ledger import Ledger


def without_pixels(experiment: ExperimentConfig) -> ExperimentConfig:
    """The experiment with its images left encoded: what a server is sent is made of those."""
    data = experiment.data.model_copy(update={"tier": "encoded"})
    return experiment.model_copy(update={"data": data})


def score_served_benchmark(
    experiment: ExperimentConfig, folder: SweepFolder, scoring: runner.Scoring, monitor: Monitor
) -> Scores:
    """A served model's scores on a benchmark; what was scored before is left as it is.

    Raises
    ------
    EvaluationError
        If the server refuses a question or does not answer it.
    """
    benchmark, server = scoring.benchmark, scoring.served
    assert benchmark is not None and server is not None
    prompts = open_split(benchmark.store, benchmark.index_file, "report")
    return _Asked(
        experiment,
        scoring,
        server,
        prompts,
        prompts.fixed_choice(benchmark.limit),
        benchmark.evaluation,
        benchmark.metrics,
        facts=benchmark.facts | {"server": server.base_url, "served_model": server.model},
    ).scores(folder, monitor)


def score_served_split(
    root: Path, split: str, server: ServedModel, *, monitor: Monitor, trust: str | None = None
) -> Scores:
    """A served model's scores on a split of a sweep folder; on `report` the ledger notes a touch.

    Raises
    ------
    ConfigError
        If the folder holds no sweep, or `trust` (MODEL@REVISION) does not fit.
    EvaluationError
        If the server refuses a question or does not answer it.
    """
    folder = SweepFolder(root.resolve())
    experiment = without_pixels(runner.recorded_experiment(folder, trust))
    jobs = preparing.plan_of(experiment)
    with Lease(folder.lease_file), ray_session(experiment):
        data = preparing.prepare_data(experiment, jobs, monitor)
        preparing.require_splits(data, split)
        scoring = runner.Scoring(None, split, 0, served=server)
        is_new = not scoring.scores_file(folder).exists()
        prompts, own = data.split(split), experiment.data
        limit = own.max_select_samples if split == "select" else own.max_report_samples
        scores = _Asked(
            experiment,
            scoring,
            server,
            prompts,
            prompts.fixed_choice(limit),
            experiment.evaluation,
            experiment.evaluation.metrics,
            overlapping=folder.overlapping(split),
        ).scores(folder, monitor)
        touched = any(row["trial_id"] == scoring.trial_id for row in folder.report_touches())
        if split == "report" and (is_new or not touched):
            Ledger(folder.ledger_file).append("touched", trial_id=scoring.trial_id, step=0)
    return scores


@dataclass(frozen=True)
class _Asked:
    """Questions to a server, and how the answers are scored."""

    experiment: ExperimentConfig
    scoring: runner.Scoring
    server: ServedModel
    prompts: PreparedSplit
    rows: list[int]
    evaluation: EvaluationConfig
    metrics: Sequence[str]
    overlapping: Collection[str] = ()
    facts: dict[str, Any] | None = None
    """Of a benchmark; None for a split of the experiment's own data."""

    def scores(self, folder: SweepFolder, monitor: Monitor) -> Scores:
        """Ask what is missing, score, and write both."""
        began = time.monotonic()
        file = self.scoring.scores_file(folder)
        store = AnswerStore(file.parent)
        known = store.open(self._made_with())
        if file.exists():
            monitor.say(
                f"{self.scoring.split}: {self.server.model} was scored before, and a server does "
                f"not tell whether its weights are the same; to ask again, remove {file.parent}"
            )
            return Scores.from_json(read_json(file))
        predictions = self._answers(store, known, monitor)
        # A benchmark's metrics need no judge, as on the executors.
        judge = None if self.facts is not None else self.evaluation.judge
        extracted = Judge(judge, file.parent).extract(predictions) if judge else None
        scores, table = score(
            predictions,
            trial_id=self.scoring.trial_id,
            step=self.scoring.step,
            split=self.scoring.split,
            metrics=self.metrics,
            answer=self.evaluation.answer,
            confidence=self.evaluation.confidence,
            num_bootstrap=self.evaluation.num_bootstrap,
            seed=self.experiment.seed,
            seconds=time.monotonic() - began,
            overlapping=self.overlapping,
            extracted=dict.fromkeys(JUDGED_METRICS, extracted) if extracted else None,
            benchmark=self.facts,
        )
        write_evaluation(file.parent, scores, table)
        store.clear()
        return scores

    def _made_with(self) -> dict[str, Any]:
        """What the answers depend on, as far as a server tells."""
        asked = [
            (self.prompts.sample_ids[row], self.prompts.text(row, "prompt")) for row in self.rows
        ]
        return {
            "server": self.server.base_url,
            "model": self.server.model,
            "samples": digest_of(asked),
            "benchmark": self.facts,
            "max_new_tokens": self.evaluation.max_new_tokens,
            "seed": self.experiment.seed,
        }

    def _answers(
        self, store: AnswerStore, known: dict[str, Prediction], monitor: Monitor
    ) -> list[Prediction]:
        """The answers to all questions, those that are known not asked for again."""
        ids = self.prompts.sample_ids
        left = [row for row in self.rows if ids[row] not in known]
        before, total = len(self.rows) - len(left), len(self.rows)
        stage = f"{self.server.model}, {self.scoring.split}"
        monitor.say(f"{stage}: {len(left)} of {total} questions to {self.server.base_url}")
        served = Served(
            self.server,
            max_new_tokens=self.evaluation.max_new_tokens,
            seed=self.experiment.seed,
            limits=self.experiment.data.image_limits,
        )
        new = served.answers(
            self.prompts,
            left,
            store.writer(0).add,
            lambda done: monitor.progress(stage, before + done, total),
        )
        answers = known | {entry.sample_id: entry for entry in new}
        return [answers[ids[row]] for row in self.rows]
