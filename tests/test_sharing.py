"""Trials on one host that come to a rung together: answered in shared batches, scored as alone."""

from __future__ import annotations

import shutil

import pytest
import torch
from evaluation_worker import Alone, prepared

from raytune_vlm.config.loader import load_experiment
from raytune_vlm.evaluate.scoring import read_predictions
from raytune_vlm.records import SweepFolder, read_json, read_json_lines
from raytune_vlm.sweep.board import IDLE
from raytune_vlm.sweep.evaluate_job import run_evaluate
from raytune_vlm.sweep.jobs import Job

RECIPES = {
    "t0000": {"lora.rank": 2},
    "t0001": {"lora.rank": 8, "lora.dropout": 0.1, "seed": 3},
    "t0002": {"lora.rank": 4, "lora.init": "pissa"},
    "t0003": {"lora.rank": 4, "lora.dora": True},
}
OVERRIDES = ["sweep.slots=4", "sweep.packing=fast", "evaluation.every=2"] + [
    f"train.{key}"
    for key in ("max_steps=4", "warmup_steps=0", "batch_size=2", "learning_rate=0.01")
]


class Packed(Alone):
    """A worker of a packed executor that gets its jobs from a list and is told what a test says."""

    def __init__(self, folder, jobs, say=lambda job, progress: "", score_s=0.0):
        self.notes, self.jobs, self.say = [], list(jobs), say
        super().__init__(folder, load_experiment(folder / "experiment.yaml", OVERRIDES))
        self._sharing.score_s = score_s
        try:
            self.work()
        finally:
            self.heartbeat.rest()

    def _take(self):
        if self.jobs:
            return self.jobs.pop(0)
        return IDLE if self._lives else None

    def _note(self, message):
        self.notes.append(message)

    def _end(self, job):
        self._words.pop(job.job_id)

    def report(self, job, report):
        super().report(job, {"trial": job.trial_id, **report})

    def told(self, job, **progress):
        super().told(job, **progress)
        word = self.say(job, progress)
        self._words[job.job_id] = word
        return word

    def asked(self, trial_id):
        """Answered and asked, as the board was told of a trial."""
        return [
            (row["step"], row["answered"], row["asked"])
            for row in self.progress
            if row["trial_id"] == trial_id and row["stage"].startswith("scoring")
        ]


def write_ledger(folder):
    """Storage without one is storage that went away."""
    ledger = SweepFolder(folder / "runs" / "small").ledger_file
    ledger.parent.mkdir(parents=True)
    ledger.touch()


def jobs(*trial_ids):
    return [Job(name, "trial", name, RECIPES[name]) for name in trial_ids]


def scored(worker, trial_id, step):
    """Scores and answers of a checkpoint, without the time that they took."""
    folder = worker.folder.trial(trial_id).evaluation("select", step)
    assert not (folder / "answers").exists()
    found = read_json(folder / "scores.json")
    return {key: value for key, value in found.items() if key != "seconds"}, sorted(
        read_predictions(folder), key=lambda entry: entry.sample_id
    )


def alone(worker, trial_id, step):
    """The same, of the checkpoint scored by itself."""
    shutil.rmtree(worker.folder.trial(trial_id).evaluation("select", step))
    recipe = RECIPES[trial_id]
    run_evaluate(worker, Job("alone", "evaluate", trial_id, recipe, split="select", step=step))
    return scored(worker, trial_id, step)


def test_trials_at_a_rung_are_scored_as_each_alone(tiny_model, tmp_path):
    def say(job, progress):
        if progress["stage"] == "scoring select" and progress["step"] == 4 and not failed:
            failed.append(job.trial_id)
            raise RuntimeError("once")
        return ""

    failed = []
    controls = {"controls": ["blank_image"], "controls_on": ["select"], "controls_samples": 3}
    prepared(tmp_path, tiny_model("idefics3"), batch_size=8, **controls)
    write_ledger(tmp_path)
    names = ("t0001", "t0002", "t0003")
    worker = Packed(tmp_path, jobs(*names), say)
    apart, together, over = worker.notes
    assert apart.startswith("t0003 steps and is scored by itself: lora.dora=true")
    assert together == "trials at a rung share their batches, the first t0001, t0002"
    assert over == "slots are scored one by one from here on: RuntimeError with 2 at once: once"
    reports = {(row["trial"], row["step"], row["done"]) for row in worker.reports}
    assert reports == {(name, step, step == 4) for name in names for step in (2, 4)}
    # 20 answers in batches of 8, then those of a control; nothing is left for each alone.
    assert worker.asked("t0001")[:4] == [(2, 0, 10), (2, 4, 10), (2, 8, 10), (2, 0, 3)]
    texts = set()
    for trial_id in ("t0001", "t0002"):
        found = scored(worker, trial_id, 2)
        assert found == alone(worker, trial_id, 2)
        texts.add(tuple(entry.text for entry in found[1]))
    assert len(texts) == 2
    assert scored(worker, "t0001", 4) == alone(worker, "t0001", 4)


class Killed(BaseException):
    """The worker ends here."""


def test_a_stop_loses_no_other_and_a_kill_no_answer(tiny_model, tmp_path):
    waited = []

    def say(job, progress):
        if progress["stage"] == "waits to be scored":
            waited.append(job.trial_id)
        where = progress["stage"], progress["step"]
        if where == ("scoring select", 4) and progress["answered"] > 4:
            raise Killed
        half_way = where == ("scoring select", 2) and progress["answered"] > 4
        return "stop" if half_way and job.trial_id == "t0001" else ""

    prepared(tmp_path, tiny_model("idefics3"), batch_size=8, controls=[])
    names = ("t0000", "t0001", "t0002")
    first, *others = jobs(*names)
    with pytest.raises(Killed):
        Packed(tmp_path, [first, IDLE, *others], say, score_s=1e6)
    assert waited == ["t0000"], "it began a step before the others"
    runs = SweepFolder(tmp_path / "runs" / "small")
    kept = {}
    for name, step in zip(names, (4, 2, 4), strict=True):
        folder = runs.trial(name).evaluation("select", step)
        assert not (folder / "scores.json").exists()
        kept[name] = sum(len(list(read_json_lines(part))) for part in folder.rglob("answers/*"))
        assert 0 < kept[name] < 10
    assert [entry.step for entry in runs.trial("t0002").scores("select")] == [2]

    again = Packed(tmp_path, jobs(*names))
    for name, step in zip(names, (4, 2, 4), strict=True):
        assert again.asked(name)[0] == (step, kept[name], 10)
    assert again.notes == ["trials at a rung share their batches, the first t0000, t0001, t0002"]
    for name in names:
        assert runs.trial(name).record().status == "finished"
        assert scored(again, name, 4) == alone(again, name, 4)


class Crowded(Packed):
    """Memory suffices for one trial, but not for scoring it beside others."""

    def __init__(self, folder, jobs):
        self.left = []
        super().__init__(folder, jobs, self.crowd)

    def crowd(self, job, progress):
        if progress["stage"].startswith("scoring") and len(self._lives) > 1:
            raise torch.OutOfMemoryError("beside others")
        return ""

    def _end(self, job):
        if self._words[job.job_id] == "alone":
            self.left.append(job.job_id)
            self.jobs.append(job)
        super()._end(job)

    def _take(self):
        return IDLE if self.left and self._lives else super()._take()


def test_who_lacks_memory_beside_others_is_not_to_blame(tiny_model, tmp_path):
    prepared(tmp_path, tiny_model("idefics3"), batch_size=8, controls=[])
    write_ledger(tmp_path)
    worker = Crowded(tmp_path, jobs("t0000", "t0001"))
    assert worker.left == ["t0000"], "then t0001 was alone"
    assert not any("failed" in row for row in worker.reports)
    for name in ("t0000", "t0001"):
        assert worker.folder.trial(name).record().status == "finished"
