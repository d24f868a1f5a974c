"""Controls and robustness of an evaluation: altered prompts, scored beside the plain ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_vlm.comparisons import Comparison, Comparisons
from raytune_vlm.config.experiment import digest_of
from raytune_vlm.errors import ModelError, RaytuneVlmError
from raytune_vlm.records import BASE_TRIAL, Scores, TrialFolder, write_json
from raytune_vlm.sweep.evaluation import Evaluation

if TYPE_CHECKING:
    import pyarrow as pa

    from raytune_vlm.evaluate.generate import Prompts
    from raytune_vlm.evaluate.scoring import Prediction


@dataclass(frozen=True)
class Alteration:
    """Other prompts in the place of an evaluation's own."""

    kind: str
    """`controls` or `robustness`."""
    name: str
    make: Callable[[list[int]], tuple[Prompts, list[int]]]
    """Rows -> the prompts and which of the rows they are made of; raises one of `skipping()`."""

    @property
    def place(self) -> str:
        """Its folder in that of the evaluation."""
        return f"{self.kind}/{self.name}"

    def made_with(self, own: Evaluation, prompts: Prompts, rows: list[int]) -> dict[str, Any]:
        """What the answers depend on beside the checkpoint."""
        return {
            "images": self.name,
            "seed": own.worker.experiment.seed,
            "samples": digest_of([prompts.sample_ids[row] for row in rows]),
        }


def skipping() -> tuple[type[RaytuneVlmError], ...]:
    """The errors of prompts that cannot be made of this model or these samples."""
    from raytune_vlm.collate.encoded import SampleRefused
    from raytune_vlm.evaluate.controls import ControlSkipped

    return (ControlSkipped, SampleRefused, ModelError)


def compared_rows(own: Evaluation) -> list[int]:
    """What comparisons are made on."""
    chosen = set(own.prompts.fixed_choice(own.worker.experiment.evaluation.controls_samples))
    return [row for row in own.rows if row in chosen]


def control_alterations(own: Evaluation) -> list[Alteration]:
    """The controls that the model is asked for, on the splits that have them."""
    from raytune_vlm.evaluate.controls import control_prompts

    worker = own.worker
    config = worker.experiment.evaluation
    asked = config.controls if own.split in config.controls_on else ()

    def make(name: Any, rows: list[int]) -> tuple[Prompts, list[int]]:
        return control_prompts(
            name,
            worker.base,
            own.prompts,
            rows,
            limits=worker.experiment.data.image_limits,
            seed=worker.experiment.seed,
        )

    return [Alteration("controls", name, partial(make, name)) for name in asked if name != "gold"]


def robustness_alterations(own: Evaluation) -> list[Alteration]:
    """The points of the robustness curve, on `report` only."""
    from raytune_vlm.evaluate.robustness import points, robustness_prompts

    worker = own.worker
    asked = points(worker.experiment.evaluation.robustness) if own.split == "report" else {}

    def make(kind: str, strength: float, rows: list[int]) -> tuple[Prompts, list[int]]:
        limits = worker.experiment.data.image_limits
        return robustness_prompts(kind, strength, worker.base, own.prompts, rows, limits=limits)

    return [
        Alteration("robustness", name, partial(make, kind, strength))
        for name, (kind, strength) in asked.items()
    ]


@dataclass
class Comparing:
    """Compares one evaluation's answers with others."""

    evaluation: Evaluation
    plain: dict[str, Prediction]
    """Sample id -> the answer to the prompt as it is."""
    rows: list[int]
    """What comparisons are made on."""
    _plain_scores: dict[tuple[str, ...], tuple[Scores, pa.Table]] = field(default_factory=dict)
    """Samples -> the scores of their plain answers; most comparisons are on the same ones."""

    def controls(self) -> Comparisons | None:
        """The controls that this split's evaluations make; None where there are none."""
        from raytune_vlm.evaluate.controls import blank_note

        own = self.evaluation
        worker, config = own.worker, own.worker.experiment.evaluation
        if own.split not in config.controls_on or not config.controls:
            return None
        altered = {entry.name: entry for entry in control_alterations(own)}
        entries = [
            self._compare(altered[name]) if name in altered else self._gold()
            for name in config.controls
        ]
        trial_id = own.job.trial_id
        who = "the base model" if trial_id == BASE_TRIAL else trial_id
        metric = worker.experiment.metric
        notes = [note for entry in entries if (note := blank_note(entry, metric, who))]
        return Comparisons(entries, [f"{note} on {own.split}" for note in notes])

    def robustness(self) -> Comparisons | None:
        """The points of the robustness curve, on `report` only; None where there are none."""
        altered = robustness_alterations(self.evaluation)
        return Comparisons([self._compare(entry) for entry in altered]) if altered else None

    def _compare(self, altered: Alteration) -> Comparison:
        """Answers to altered prompts, scored beside the plain ones of the same samples."""
        began, name, own = time.monotonic(), altered.name, self.evaluation
        try:
            prompts, rows = altered.make(self.rows)
            own.together(prompts)
        except skipping() as error:
            return Comparison(name, skipped=error.message)
        folder = own.folder / altered.place
        made = altered.made_with(own, prompts, rows)
        answers = own.answers(prompts, rows, folder, made, f"scoring {own.split}, {name}")
        scored = own.score(answers, folder, time.monotonic() - began)
        return self._compared(name, answers, scored, folder)

    def _gold(self) -> Comparison:
        """The references themselves as answers; no judge has to find them."""
        from raytune_vlm.config.evaluation import JUDGED_METRICS
        from raytune_vlm.evaluate.controls import gold_answers

        answers = gold_answers(self.evaluation.prompts, self.rows, self.evaluation.worker.base)
        texts: list[str | None] = [entry.text for entry in answers]
        extracted = dict.fromkeys(JUDGED_METRICS, texts)
        folder = self.evaluation.folder / "controls" / "gold"
        scored = self.evaluation.score(answers, folder, 0.0, extracted)
        return self._compared("gold", answers, scored, folder)

    def _compared(
        self,
        name: str,
        answers: Sequence[Prediction],
        scored: tuple[Scores, pa.Table],
        folder: Path,
    ) -> Comparison:
        """Both scores and the paired tests, altered minus plain; rank 0 writes the altered ones."""
        from raytune_vlm.evaluate.matrix import paired_values
        from raytune_vlm.evaluate.metrics import METRICS
        from raytune_vlm.evaluate.scoring import write_evaluation
        from raytune_vlm.evaluate.statistics import paired_test

        config = self.evaluation.worker.experiment.evaluation
        own, own_table = self._plain_of(answers)
        altered, table = scored
        if self.evaluation.worker.world.rank == 0:
            write_evaluation(folder, altered, table)
        groups = [entry.group_id for entry in answers]
        tests = {}
        for metric in config.metrics:
            values, weights = paired_values([table, own_table], metric)
            tests[metric] = paired_test(
                values,
                weights,
                groups,
                metric=metric,
                first=name,
                second="plain",
                confidence=config.confidence,
                num_bootstrap=config.num_bootstrap,
                seed=self.evaluation.worker.experiment.seed,
                combine=METRICS[metric].combine,
            )
        return Comparison(
            name,
            num_samples=len(answers),
            plain={metric: entry.value for metric, entry in own.metrics.items()},
            altered={metric: entry.value for metric, entry in altered.metrics.items()},
            tests=tests,
        )

    def _plain_of(self, answers: Sequence[Prediction]) -> tuple[Scores, pa.Table]:
        """The plain scores of the samples that some answers are for."""
        ids = tuple(entry.sample_id for entry in answers)
        if ids not in self._plain_scores:
            same = [self.plain[name] for name in ids]
            self._plain_scores[ids] = self.evaluation.score(same, self.evaluation.folder, 0.0)
        return self._plain_scores[ids]


def note_on(trial: TrialFolder, split: str, notes: Sequence[str]) -> None:
    """Put what a reader has to know into a trial's record, in the place of earlier notes."""
    if trial.record_file.exists():
        record = trial.record()
        kept = [note for note in record.notes if not note.endswith(f" on {split}")]
        write_json(trial.record_file, replace(record, notes=[*kept, *notes]))
