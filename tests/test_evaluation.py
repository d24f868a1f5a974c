"""An evaluation on a worker: killed and gone on with, dealt out, compared with its controls."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_worker import Alone, prepared
from made import cli_environment, experiment, picture

from raytune_vlm.comparisons import Comparisons
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.errors import ConfigError
from raytune_vlm.evaluate.altered import ALTERATIONS, AlteredPrompts, own_pictures, partners
from raytune_vlm.evaluate.answers import AnswerStore
from raytune_vlm.evaluate.generate import deal, generate
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.records import SweepFolder, TrialRecord, read_json, write_json
from raytune_vlm.sweep.comparing import note_on
from raytune_vlm.sweep.evaluate_job import run_evaluate
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.ledger import Ledger, TrialState
from raytune_vlm.sweep.progress import where
from raytune_vlm.sweep.runner import Scoring, scoring_jobs
from raytune_vlm.sweep.single import chosen
from raytune_vlm.train import checkpoint

BOTH = ["blank_image", "gold"]
FIELDS = [entry.name for entry in fields(Prediction)]
FROM = {"text": "prediction"}
"""A field of `Prediction` -> its column, where that has another name."""


def child(folder: Path, split: str, slow_s: float) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("evaluation_worker.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), split, str(slow_s)],
        stdout=subprocess.DEVNULL,
        env=cli_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def number_of_answers(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("**/answers/*.jsonl"))


def result(folder: Path) -> dict[str, object]:
    """All that an evaluation says, without the time it took."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".json":
            found[name] = {**read_json(file), "seconds": None}
        elif file.suffix == ".parquet":
            found[name] = pq.read_table(file).to_pylist()
    return found


def test_a_killed_evaluation_goes_on_where_it_was(tiny_model, tmp_path):
    experiment = prepared(tmp_path, tiny_model("idefics3"), controls=BOTH)
    folder = Alone(tmp_path, experiment).evaluate("report")
    undisturbed = result(folder)
    shutil.rmtree(folder)
    running = child(tmp_path, "report", slow_s=0.5)
    try:
        while number_of_answers(folder) < 12:  # ten answers, then two of a control
            assert running.poll() is None
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    kept = number_of_answers(folder)
    assert not (folder / "scores.json").exists()
    part = next((folder / "controls" / "blank_image" / "answers").glob("*.jsonl"))
    with part.open("a") as stream:
        stream.write('{"sample_id": "torn')
    again = Alone(tmp_path, experiment)
    again.evaluate("report")
    asked = sum(progress["asked"] - progress["answered"] for progress in again.progress[:1])
    assert asked == 20 - kept
    assert result(folder) == undisturbed
    assert not list(folder.rglob("answers"))


def saved_trial(worker: Alone, trial_id: str, number: int, lora: dict[str, object]) -> Job:
    """A checkpoint with an effect, and the job that scores it on `report`."""
    recipe = {f"lora.{key}": value for key, value in lora.items()}
    experiment = worker.experiment.with_recipe(recipe)
    base = worker.base
    model = attach(base.model, base.family, experiment.lora, seed=experiment.seed)
    torch.manual_seed(number)
    trained = [entry for entry in model.parameters() if entry.requires_grad]
    for parameter in trained:
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = worker.folder.trial(trial_id).checkpoint(3)
    checkpoint.save(
        folder, model, torch.optim.AdamW(trained), checkpoint.RunState(3, "", "", 0), []
    )
    base.model = detach(model)
    return Job(f"{trial_id}/report/3", "evaluate", trial_id, recipe, split="report", step=3)


def test_several_checkpoints_in_one_job_are_scored_as_one_by_one(tiny_model, tmp_path):
    worker = Alone(tmp_path, prepared(tmp_path, tiny_model("idefics3"), controls=BOTH))
    jobs = [
        Job("base/report/0", "evaluate", "base", {}, split="report"),
        saved_trial(worker, "t0000", 0, {"rank": 2}),
        saved_trial(worker, "t0001", 1, {"rank": 8}),
        saved_trial(worker, "t0002", 2, {"rank": 4, "dora": True}),
    ]
    folders = [worker.folder.trial(job.trial_id).evaluation("report", job.step) for job in jobs]
    for job in jobs:
        run_evaluate(worker, job)
    apart = [result(folder) for folder in folders]
    kept = {file: file.read_bytes() for file in folders[1].glob("made_with.json")}
    rows = pq.read_table(folders[1] / "predictions.parquet").slice(0, 4).to_pylist()
    for folder in folders:
        shutil.rmtree(folder)
    # What an earlier life of one of them left: four of its ten answers.
    folders[1].mkdir()
    for file, content in kept.items():
        file.write_bytes(content)
    known = [Prediction(**{name: row[FROM.get(name, name)] for name in FIELDS}) for row in rows]
    AnswerStore(folders[1]).writer(0).add(known)
    worker.progress.clear()
    run_evaluate(worker, replace(jobs[0], others=tuple(jobs[1:])))
    assert [result(folder) for folder in folders] == apart
    assert (worker.progress[0]["answered"], worker.progress[0]["asked"]) == (4, 40)
    assert worker.progress[0]["trial_id"] == "base, t0000, t0001, t0002"
    notes = worker.reports[-1]["notes"]
    assert notes[0][1].startswith("t0002 was answered by itself on report: lora.dora=true")
    assert [note for note in notes if "by itself" in note[1]] == [notes[0]]
    texts = {tuple(row["prediction"] for row in found["predictions.parquet"]) for found in apart}
    assert len(texts) == 4


def test_checkpoints_that_are_asked_the_same_share_a_job():
    config = experiment(
        evaluation={"rung_samples": 0.5, "every": 5},
        sweep={"num_executors": 2, "num_trials": 4},
        train={"max_steps": 10, "warmup_steps": 1},
    )
    trials = [TrialState(f"t{number}", number, {}) for number in range(3)]
    asked = [Scoring(trial, "report", 10) for trial in trials] + [Scoring(None, "report", 0)]
    jobs = scoring_jobs(config, asked)
    ids = [[entry.trial_id for entry in (job, *job.others)] for job in jobs]
    assert ids == [["t0", "t2"], ["t1", "base"]]
    # A rung that saw less of `select` was asked something else.
    jobs = scoring_jobs(config, [Scoring(trials[0], "select", 5), Scoring(trials[1], "select", 10)])
    assert [job.others for job in jobs] == [(), ()]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["base", "t0001"], r"has no trial 't0001' \(did you mean 't0000'\?\)"),
        (["t0000"], "t0000 has no whole checkpoint"),
        (["best"], "has no winner yet"),
        (["base", "base"], "--trial base,base: base is named twice"),
    ],
)
def test_trials_that_cannot_be_scored_are_refused(names, line, tmp_path):
    folder = SweepFolder(tmp_path)
    Ledger(folder.ledger_file).append("proposed", trial_id="t0000", number=0, recipe={})
    with pytest.raises(ConfigError, match=line):
        chosen(folder, names, "report")


def test_answers_of_something_else_are_thrown_away(tmp_path):
    answer = Prediction("s0", "g0", "read", "tea", "\ud800", 2, False)
    store = AnswerStore(tmp_path)
    assert store.open({"checkpoint": "a"}) == {}
    store.writer(0).add([answer])
    store.writer(1).add([replace(answer, sample_id="s1")])
    assert AnswerStore(tmp_path).open({"checkpoint": "a"}).keys() == {"s0", "s1"}
    assert AnswerStore(tmp_path).open({"checkpoint": "a"})["s0"] == answer
    assert AnswerStore(tmp_path).open({"checkpoint": "b"}) == {}
    assert AnswerStore(tmp_path).open({"checkpoint": "a"}) == {}


def test_rows_are_dealt_evenly_and_all_of_them():
    lengths = np.random.default_rng(0).integers(10, 4000, 101)
    hands = deal(lengths, range(101), 4, extra=100)
    assert sorted(row for hand in hands for row in hand) == list(range(101))
    loads = [int(lengths[hand].sum()) + 100 * len(hand) for hand in hands]
    assert max(loads) - min(loads) < 200
    assert deal(lengths, [], 2, extra=1) == [[], []]


def test_batches_that_memory_does_not_suffice_for_are_halved(tiny_base, tiny_prompts):
    base, split, rows = tiny_base("idefics3"), tiny_prompts("idefics3"), list(range(9))
    config, told = EvaluationConfig(max_new_tokens=4, batch_size=8), []
    whole = generate(base.model, base, split, rows, config)

    def out_of_memory(module, args, kwargs):
        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError("too many\nand a second line")

    hook = base.model.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    try:
        most = 2
        assert generate(base.model, base, split, rows, config, say=told.append) == whole
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            generate(base.model, base, split, rows, config)
    finally:
        hook.remove()
    assert [message.split(" (")[0] for message in told] == [
        "out of memory with 8 prompts in a batch",
        "out of memory with 4 prompts in a batch",
    ]
    assert told[1].endswith("2 for the rest of these (too many)")


def test_shares_and_batches_of_any_size_give_the_same_answers(tiny_base, tiny_prompts):
    base, split = tiny_base("qwen2_5_vl"), tiny_prompts("qwen2_5_vl")
    rows = [7, 0, 31, 12, 5, 22, 39, 3, 18]

    def answers(chosen, size):
        config = EvaluationConfig(max_new_tokens=4, batch_size=size)
        return generate(base.model, base, split, chosen, config)

    alone = answers(rows, 1)
    assert answers(rows, 3) == answers(rows, 8) == alone
    assert answers(rows[::-1], 3) == alone[::-1]
    shares = [answers(hand, 3) for hand in deal(split.lengths, rows, 2, extra=4)]
    by_id = {entry.sample_id: entry for share in shares for entry in share}
    assert [by_id[entry.sample_id] for entry in alone] == alone


@pytest.fixture(scope="module")
def scored(tiny_model, tmp_path_factory):
    """The base model on `report`, with all controls and a robustness curve."""
    folder = tmp_path_factory.mktemp("scored")
    robustness = {"jpeg_quality": [90, 20], "blur_sigma": [3], "rotation_degrees": [90]}
    experiment = prepared(
        folder,
        tiny_model("idefics3"),
        controls_samples=6,
        robustness={**robustness, "scale": [0.5]},
    )
    return Alone(folder, experiment)


def test_every_control_is_scored_beside_the_plain_answers(scored):
    folder = scored.evaluate("report")
    found = Comparisons.from_json(read_json(folder / "controls.json"))
    assert [entry.name for entry in found.entries] == [
        "blank_image",
        "shuffled_image",
        "text_only",
        "gold",
    ]
    for entry in found.entries:
        assert entry.skipped is None
        assert entry.num_samples == 6
        scores = read_json(folder / "controls" / entry.name / "scores.json")
        for metric, test in entry.tests.items():
            assert scores["metrics"][metric]["value"] == entry.altered[metric]
            assert test.difference == pytest.approx(entry.altered[metric] - entry.plain[metric])
            assert test.lower <= test.difference <= test.upper
    gold = found.entries[-1]
    assert gold.altered == {"cer@micro": 0.0, "exact_match@strip": 1.0}
    assert scored.reports[-1]["notes"] == [("base", note) for note in found.notes]
    assert "the base model is not shown to use its images" in found.notes[0]


def test_every_point_of_the_curve_is_scored(scored):
    folder = scored.evaluate("report")
    entries = Comparisons.from_json(read_json(folder / "robustness.json")).entries
    assert [entry.name for entry in entries] == [
        "jpeg_quality=90",
        "jpeg_quality=20",
        "blur_sigma=3",
        "rotation_degrees=90",
        "scale=0.5",
    ]
    assert all(entry.num_samples == 6 and entry.skipped is None for entry in entries)
    told = {progress["stage"] for progress in scored.progress}
    assert {"scoring report", "scoring report, blank_image", "scoring report, scale=0.5"} <= told
    last = scored.progress[-1]
    assert 0 < last["answered"] < last["asked"] == 6
    assert last["seconds_left"] > 0


def test_the_console_says_how_far_an_evaluation_is():
    told = {"trial_id": "t0001", "stage": "scoring report", "step": 200, "asked": 400}
    assert where({**told, "answered": 0, "seconds_left": None}) == (
        "t0001 scoring report step 200, 0/400 prompts"
    )
    line = where({**told, "answered": 120, "seconds_left": 95.0})
    assert line == "t0001 scoring report step 200, 120/400 prompts, 1\u00a0min\u00a035\u00a0s left"
    training = {"trial_id": "t0001", "stage": "training", "step": 3, "max_steps": 12}
    assert where(training) == "t0001 training 3/12"


def test_a_curve_that_is_asked_for_later_asks_nothing_again(scored):
    folder = scored.evaluate("report")
    before = result(folder)
    (folder / "scores.json").unlink()
    told = len(scored.progress)
    scored.evaluate("report")
    assert result(folder) == before
    assert len(scored.progress) == told


def test_select_makes_no_controls_unless_asked_to(scored):
    folder = scored.evaluate("select")
    assert (folder / "scores.json").exists()
    assert not (folder / "controls.json").exists()
    assert not (folder / "robustness.json").exists()


def test_a_trial_that_does_not_look_has_a_note_in_its_record(scored):
    trial = scored.folder.trial("t0000")
    write_json(trial.record_file, TrialRecord("t0000", 0, {}, "finished"))
    note_on(trial, "report", ["blind on report"])
    note_on(trial, "select", ["also blind on select"])
    note_on(trial, "report", ["still blind on report"])
    assert trial.record().notes == ["also blind on select", "still blind on report"]


def test_prompts_encoded_again_are_those_of_the_store(scored):
    split, limits = scored.splits["report"], ImageLimits()
    rows = list(range(len(split)))
    same = AlteredPrompts(split, scored.base, rows, lambda row: own_pictures(split, limits, row))
    assert same.lengths.tolist() == split.lengths.tolist()
    for row in rows:
        made, stored = same.encoded(row), split.encoded(row)
        assert np.array_equal(made.input_ids, stored.input_ids)
        assert made.tensors.keys() == stored.tensors.keys()
        for name, tensor in stored.tensors.items():
            assert np.array_equal(made.tensors[name], tensor)


def test_shuffled_images_are_never_the_own_and_as_many(scored):
    class Counted:
        num_images = np.array([1, 1, 2, 1, 0, 2, 3, 1])

    found = partners(Counted(), range(8), seed=1)
    assert sorted(found) == [0, 1, 2, 3, 5, 7]
    assert all(row != other for row, other in found.items())
    assert all(Counted.num_images[row] == Counted.num_images[x] for row, x in found.items())
    assert found == partners(Counted(), range(8), seed=1)
    assert sorted(found.values()) == sorted(found)


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"controls": ["blank_image", "blank_image"]}, "distinct"),
        ({"controls": ["blank"]}, "blank_image"),
        ({"controls": [], "controls_on": ["select"]}, "has no effect"),
        ({"controls": [], "controls_samples": 5}, "has no effect"),
        ({"robustness": {"scale": [1.5]}}, "less than 1"),
        ({"robustness": {"jpeg_quality": [50, 50]}}, "distinct"),
        ({"metrics": ["mathvista@judge"]}, "needs evaluation.judge"),
        ({"judge": {"base_url": "http://x/v1", "model": "m"}}, "has no effect"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(section, line):
    with pytest.raises(ValueError, match=line):
        EvaluationConfig.model_validate(section)


def test_alterations_are_deterministic_and_change_what_they_say():
    image, limits = picture(1), ImageLimits()
    for kind, strength in {"jpeg_quality": 20, "blur_sigma": 2.0, "rotation_degrees": 30}.items():
        first, second = (ALTERATIONS[kind](image, strength, limits) for _ in range(2))
        assert first.tobytes() == second.tobytes() != image.tobytes()
        assert first.size == image.size
    assert ALTERATIONS["scale"](image, 0.5, limits).size == (32, 24)
