"""What optuna-dashboard shows of a trial besides numbers: a note with recipe, score and answers.

Notes are kept in the study, images in `study-images/` beside it; both are made anew with it.
"""

from __future__ import annotations

import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.exceptions import ExperimentalWarning

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.records import Scores, SweepFolder
from raytune_vlm.references import read_reference
from raytune_vlm.report.formatting import recipe_value
from raytune_vlm.sweep.head import experiment_in

NUM_PICTURES = 4
"""Samples whose image and answer a trial's note shows: the same for all trials."""

LONGEST_TEXT = 400
"""Characters of an answer."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~$&])")


def images_folder(folder: SweepFolder) -> Path:
    """Where the images of the study are, under the names that Optuna gives them."""
    return folder.root / "study-images"


def how_to_watch(folder: SweepFolder) -> str:
    """The line that says how the study is opened in a browser."""
    line = (
        f"watch: optuna-dashboard sqlite:///{folder.study_file.resolve()} "
        f"--artifact-dir {images_folder(folder).resolve()}"
    )
    if find_spec("optuna_dashboard") is None:
        line += (
            " (first pip install 'raytune-vlm[dashboards]'; where it is not installed, trials "
            "get no notes)"
        )
    return line


class Notes:
    """Writes the notes of a study; nothing where optuna-dashboard is not installed."""

    def __init__(self, folder: SweepFolder, study: optuna.Study) -> None:
        self._folder, self._study = folder, study
        self._images: dict[str, str] = {}
        """Sample -> the address of its image."""
        self._is_on = find_spec("optuna_dashboard") is not None
        shutil.rmtree(images_folder(folder), ignore_errors=True)
        self._store = FileSystemArtifactStore(images_folder(folder))

    def write_head(self) -> None:
        """Name the objectives and write the note of the study."""
        if self._is_on and self._folder.experiment_file.exists():
            from optuna_dashboard import save_note

            experiment = experiment_in(self._folder)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._study.set_metric_names(list(experiment.objectives))
            save_note(self._study, _study_note(experiment))

    def write(self, own: int, trial: optuna.trial.FrozenTrial) -> None:
        """Write the note of a trial that has ended; `own` is its id in the study's storage."""
        trial_id = trial.user_attrs.get("trial")
        if not self._is_on or not (self._folder.root / "trials" / str(trial_id)).is_dir():
            return  # also the trials of other sweeps that this one learned from
        from optuna_dashboard._note import note_ver_key, split_body

        # `save_note` reads the notes of all trials for each, in case there is an older one.
        parts = {note_ver_key(own): 1, **split_body(self._text(trial), own)}
        for key, value in parts.items():
            self._study._storage.set_study_system_attr(self._study._study_id, key, value)

    def _text(self, trial: optuna.trial.FrozenTrial) -> str:
        trial_id, attributes = str(trial.user_attrs["trial"]), trial.user_attrs
        folder = self._folder.trial(trial_id)
        recipe = folder.record().recipe if folder.record_file.exists() else trial.params
        ended = f"{attributes['status']} at step {attributes['steps']}"
        if "message" in attributes:
            ended += f": {plain(attributes['message'])}"
        lines = [f"# {trial_id}: {ended}", "", "| key | value |", "|---|---|"]
        lines += [f"| `{key}` | {plain(recipe_value(value))} |" for key, value in recipe.items()]
        scored = folder.scores("select")
        if scored:
            lines += ["", *_score_lines(scored[-1])]
            lines += ["", *self._answer_lines(trial_id, scored[-1])]
        return "\n".join(lines) + "\n"

    def _answer_lines(self, trial_id: str, scores: Scores) -> list[str]:
        """Some samples: image, right answer, answer, scores."""
        evaluation = self._folder.trial(trial_id).evaluation("select", scores.step)
        there = [file.stem for file in self._folder.gallery.glob("*.jpg")]
        if not there:  # data without images: Arrow cannot compare texts with an empty list
            return []
        rows = pq.read_table(
            evaluation / "predictions.parquet", filters=[("sample_id", "in", there)]
        ).to_pylist()
        rows = sorted(rows, key=lambda row: str(row["sample_id"]))[:NUM_PICTURES]
        lines = []
        for row in rows:
            right = " or ".join(dict.fromkeys(read_reference(row["reference"]).answers))
            values = [f"{metric} {row[metric]:.3f}" for metric in scores.metrics]
            lines += [
                # Not in the table, which would shrink it.
                f"![]({self._image(row['sample_id'])})",
                "",
                "| | |",
                "|---|---|",
                f"| right answer | {plain(right)} |",
                f"| answer | {plain(row['prediction'])} |",
                f"| scores | {plain(', '.join(values))} |",
                "",
            ]
        return lines

    def _image(self, sample_id: str) -> str:
        """The address of a sample's image, which is stored in the study the first time."""
        if sample_id not in self._images:
            from optuna_dashboard.artifact import get_artifact_path

            images_folder(self._folder).mkdir(exist_ok=True)
            name = upload_artifact(
                artifact_store=self._store,
                file_path=str(self._folder.gallery / f"{sample_id}.jpg"),
                study_or_trial=self._study,
            )
            self._images[sample_id] = get_artifact_path(self._study, name)
        return self._images[sample_id]


def _study_note(experiment: ExperimentConfig) -> str:
    """What the study is."""
    names = [f"`{name}` ({mode})" for name, mode in experiment.objectives.items()]
    return (
        f"# {experiment.name}\n\n{plain(experiment.model.name)}; objectives on `select`: "
        f"{', '.join(names)}; up to {experiment.train.max_steps} steps, scored at "
        f"{', '.join(map(str, experiment.rungs))}.\n\n"
        "A pruned trial was stopped early, failed, or broke a constraint: its `status` says which. "
        "Scores here are of the samples that the search sees; the decision, with bias corrected "
        "and tested on other samples, is in `report/index.html` of the sweep folder.\n"
    )


def plain(text: Any) -> str:
    """Text from outside for a cell of a table in Markdown: all of it is text."""
    short = " ".join(str(text).split())
    if len(short) > LONGEST_TEXT:
        short = short[:LONGEST_TEXT] + "…"
    return _MARKDOWN.sub(r"\\\1", short)


def _score_lines(scores: Scores) -> list[str]:
    """The scores with their intervals."""
    lines = [
        f"On `select` at step {scores.step}, {scores.num_samples} samples:",
        "",
        "| metric | score | interval |",
        "|---|---|---|",
    ]
    for name, entry in scores.metrics.items():
        interval = f"{entry.lower:.3f} to {entry.upper:.3f}"
        lines.append(f"| `{name}` | {entry.value:.3f} | {interval} |")
    return lines
