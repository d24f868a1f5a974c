"""Controls and robustness of an evaluation: altered prompts, scored beside the plain ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_vlm.comparisons import Comparison, Comparisons
from raytune_vlm.config.experiment import digest_of
from raytune_vlm.errors import ModelError
from raytune_vlm.records import BASE_TRIAL, Scores, TrialFolder, write_json
from raytune_vlm.sweep.evaluation import Evaluation

if TYPE_CHECKING:
    import pyarrow as pa

    from raytune_vlm.evaluate.generate import Prompts
    from raytune_vlm.evaluate.scoring import Prediction


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
        from raytune_vlm.evaluate.controls import blank_note, control_prompts

        own = self.evaluation
        worker, config = own.worker, own.worker.experiment.evaluation
        if own.split not in config.controls_on or not config.controls:
            return None
        entries = []
        for name in config.controls:
            if name == "gold":
                entries.append(self._gold())
                continue

            def make(name: Any = name) -> tuple[Prompts, list[int]]:
                return control_prompts(
                    name,
                    worker.base,
                    own.prompts,
                    self.rows,
                    limits=worker.experiment.data.image_limits,
                    seed=worker.experiment.seed,
                )

            entries.append(self._compare(name, make, "controls"))
        trial_id = own.job.trial_id
        who = "the base model" if trial_id == BASE_TRIAL else trial_id
        metric = worker.experiment.metric
        notes = [note for entry in entries if (note := blank_note(entry, metric, who))]
        return Comparisons(entries, [f"{note} on {own.split}" for note in notes])

    def robustness(self) -> Comparisons | None:
        """The points of the robustness curve, on `report` only; None where there are none."""
        from raytune_vlm.evaluate.robustness import points, robustness_prompts

        worker = self.evaluation.worker
        asked = points(worker.experiment.evaluation.robustness)
        if self.evaluation.split != "report" or not asked:
            return None
        entries = []
        for name, (kind, strength) in asked.items():

            def make(kind: str = kind, strength: float = strength) -> tuple[Prompts, list[int]]:
                return robustness_prompts(
                    kind,
                    strength,
                    worker.base,
                    self.evaluation.prompts,
                    self.rows,
                    limits=worker.experiment.data.image_limits,
                )

            entries.append(self._compare(name, make, "robustness"))
        return Comparisons(entries)

    def _compare(
        self,
        name: str,
        make: Callable[[], tuple[Prompts, list[int]]],
        kind: str,
    ) -> Comparison:
        """Answers to altered prompts, scored beside the plain ones of the same samples."""
        from raytune_vlm.collate.encoded import SampleRefused
        from raytune_vlm.evaluate.controls import ControlSkipped

        began, folder = time.monotonic(), self.evaluation.folder / kind / name
        try:
            prompts, rows = make()
            self.evaluation.together(prompts)
        except (ControlSkipped, SampleRefused, ModelError) as error:
            return Comparison(name, skipped=error.message)
        made = {"images": name, "seed": self.evaluation.worker.experiment.seed}
        made["samples"] = digest_of([prompts.sample_ids[row] for row in rows])
        stage = f"scoring {self.evaluation.split}, {name}"
        answers = self.evaluation.answers(prompts, rows, folder, made, stage)
        scored = self.evaluation.score(answers, folder, time.monotonic() - began)
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
