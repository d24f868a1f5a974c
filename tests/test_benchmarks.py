"""The contract of the table of benchmarks: each is read, asked and scored as its authority says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raytune_vlm.cli import cli
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import BENCHMARK_NAMES
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.errors import ConfigError, DataError
from raytune_vlm.evaluate.benchmarks import BENCHMARKS, find_benchmark, find_benchmarks
from raytune_vlm.evaluate.benchmarks.card import make_card
from raytune_vlm.evaluate.benchmarks.fixture_rows import COLOURS, draw
from raytune_vlm.evaluate.benchmarks.fixtures import FOLDER, TABLES, write_fixtures
from raytune_vlm.evaluate.benchmarks.submissions import write_submission
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.evaluate.scoring import Prediction, score, write_evaluation
from raytune_vlm.models.adapter_file import save_adapter
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.prepare.prepare import list_shards, prepare, store_of
from raytune_vlm.prepare.shard import PixelStep, Preparer, TokenStep
from raytune_vlm.records import Sample, SweepFolder
from raytune_vlm.references import read_reference
from raytune_vlm.sources import SOURCES
from raytune_vlm.sweep import benchmarks as suites
from raytune_vlm.sweep.evaluate_job import run_evaluate
from raytune_vlm.sweep.runner import Scoring
from raytune_vlm.train.world import World

CAPTIONS = ("cider@coco", "bleu4@coco")
"""CIDEr goes to 10 and grows with agreement among references; BLEU-4 is of the corpus."""


def plain_experiment(**sections):
    return ExperimentConfig.model_validate(
        {
            "name": "benchmarks",
            "data": {"sources": [{"type": "messages", "path": "x"}]},
            "evaluation": {"num_bootstrap": 100},
            **sections,
        }
    )


def read(name, data="fixtures"):
    """Everything that the sources give of a benchmark."""
    suite = suites.suite_of(plain_experiment(), [find_benchmark(name)], data=data, limit=None)
    found = []
    for job in list_shards(suite.experiment):
        source = suite.experiment.data.sources[job.source]
        found += SOURCES["table"].read_shard(source, job.shard, ImageLimits())
    return found


def reference_of(sample):
    return read_reference(sample.answer)


def prompt_of(sample):
    return "".join(part.get("text", "") for part in sample.messages[0]["content"])


def kinds_of(sample):
    return [part["type"] for part in sample.messages[0]["content"]]


@pytest.fixture
def prepared(tmp_path, tiny_model):
    """A benchmark prepared in this process, as the executors are given it."""

    def run(name, data="fixtures", limit=None):
        experiment = plain_experiment(
            storage_path=str(tmp_path / "runs"), model={"name": str(tiny_model("idefics3"))}
        )
        suite = suites.suite_of(experiment, [find_benchmark(name)], data=data, limit=limit)
        jobs = list_shards(suite.experiment)
        store_of(experiment).mkdir(parents=True, exist_ok=True)
        preparer = Preparer(suite.experiment, store_of(experiment))
        for step in (TokenStep(preparer), PixelStep(preparer)):
            for job in jobs:
                step(job)
        found = prepare(suite.experiment, jobs, lambda *_: None, for_training=False)
        chosen, sources = suite.members[0]
        return suites._prepared(suite, chosen, sources, found, {}), found

    return run


def test_the_names_that_an_experiment_may_give_are_those_of_the_table():
    assert tuple(BENCHMARKS) == BENCHMARK_NAMES


def test_the_fixtures_are_what_their_program_makes(tmp_path):
    for made in write_fixtures(tmp_path):
        shipped = FOLDER / made.relative_to(tmp_path)
        assert shipped.stat().st_size < 60_000
        if made.suffix != ".parquet":
            continue
        ours, theirs = pq.read_table(made), pq.read_table(shipped)
        assert ours.schema == theirs.schema
        for row, other in zip(ours.to_pylist(), theirs.to_pylist(), strict=True):
            for key, value in row.items():
                if not isinstance(value, dict) or "bytes" not in value:  # zlib may differ
                    assert other[key] == value
    folders = {
        f"{entry.folder or name}/{entry.dataset_split}" for name, entry in BENCHMARKS.items()
    }
    assert folders == set(TABLES)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_is_read_and_the_prompt_holds_what_the_entry_says(name):
    entry, found = BENCHMARKS[name], read(name)
    file = f"{entry.folder or name}/{entry.dataset_split}-00000-of-00001.parquet"
    rows = pq.read_table(FOLDER / file).to_pylist()
    rows = [row for row in rows if all(row[key] == value for key, value in entry.keep.items())]
    assert all(isinstance(sample, Sample) for sample in found), found
    assert len(found) == len(rows) == len({sample.sample_id for sample in found})
    fixed = [part for part in entry.prompt.split("{choices}")[0].split("{question}") if part]
    for sample, row in zip(found, rows, strict=True):
        assert kinds_of(sample).count("image") == len(sample.images) >= 1
        prompt = prompt_of(sample)
        if entry.function != "mmmu":
            assert all(part in prompt for part in fixed)
        if entry.columns.question and entry.function != "mmmu":
            asked = row[entry.columns.question].strip()
            assert (asked.capitalize() if entry.capitalize else asked) in prompt
        if entry.columns.choices and entry.function == "question":
            for letter, text in zip("ABC", row[entry.columns.choices], strict=True):
                assert f"\n{letter}. {text}" in prompt


def perfect(sample, metric):
    """What the metric's rule allows a right answer at most."""
    if metric.startswith("medical"):
        kind = reference_of(sample).type.lower()
        if not metric.startswith(f"medical_{kind}"):
            return None  # this metric has no score for it
        if metric == "medical_closed@llava_med":
            # The authority's rule: an answer that says neither yes nor no is wrong.
            return float(reference_of(sample).answers[0].lower() in ("yes", "no"))
    return 1.0


@pytest.mark.parametrize("name", [name for name, entry in BENCHMARKS.items() if entry.metrics])
def test_gold_answers_score_one(name):
    samples = read(name)
    references = [reference_of(sample) for sample in samples]
    golds = [max(set(x.answers), key=x.answers.count) for x in references]
    for metric in BENCHMARKS[name].metrics:
        results = METRICS[metric].score_all(golds, references)
        if metric in CAPTIONS:
            assert all(result.value > 0.5 for result in results)
            continue
        for sample, result in zip(samples, results, strict=True):
            allowed = perfect(sample, metric)
            if allowed is None:
                assert result.value != result.value
            else:
                assert result.value == pytest.approx(allowed), (metric, sample.answer)
        wrong = METRICS[metric].score_all(["qqq"] * len(samples), references)
        assert all(not result.value > 0.2 for result in wrong)


def test_every_gold_answer_of_several_counts():
    for name in ("docvqa", "ocrbench", "mmmu"):
        for sample in read(name):
            reference = reference_of(sample)
            for answer in reference.answers:
                for metric in BENCHMARKS[name].metrics:
                    assert METRICS[metric].score_all([answer], [reference])[0].value == 1.0


def test_images_of_mmmu_stand_where_they_are_named_in_the_order_of_their_names():
    sample = read("mmmu")[1]
    parts = sample.messages[0]["content"]
    assert [part.get("text", "IMAGE") for part in parts] == [
        "Compare ",
        "IMAGE",
        " with ",
        "IMAGE",
        ": which bar is blue?\n\n(A) ",
        "IMAGE",
        "\n(B) <image 2>\n(C) neither\n(D) both\n\n\n"
        "Answer with the option's letter from the given choices directly.",
    ]
    first, second, third = (
        draw("Accounting"[:8], COLOURS[1]),
        draw("second", "red"),
        draw("third", "blue"),
    )
    assert [len(image) for image in sample.images] == [
        len(image["bytes"]) for image in (second, first, third)
    ]
    assert reference_of(sample).category == "Accounting"
    opened = read("mmmu")[2]
    assert prompt_of(opened).endswith("\n\nAnswer the question using a single word or phrase.")
    assert reference_of(opened).choices == ()


def test_categories_and_groups():
    def categories(name):
        return Counter(reference_of(sample).category for sample in read(name))

    def groups(name):
        return len({sample.group_id for sample in read(name)})

    assert categories("chartqa") == {"human": 3, "augmented": 3}
    assert set(categories("chartqa@human")) == {"human"}
    assert categories("vqav2") == {"yes/no": 2, "number": 2, "other": 2}
    assert len(categories("ocrbench")) == 8 and len(categories("mmmu")) == 6
    assert set(categories("mmmu@Computer_Science")) == {"Computer_Science"}
    assert categories("mathvista").total() == 6 and len(categories("mathvista")) == 2
    assert (groups("docvqa"), groups("textvqa"), groups("vqav2")) == (2, 3, 3)
    assert (groups("mathvista"), groups("coco_karpathy"), groups("slake")) == (3, 6, 4)
    assert groups("vqa_rad") == 5, "by the images, where the data names none"


def test_masked_and_unmasked_diagrams_are_kept_apart():
    masked, unmasked = read("ai2d"), read("ai2d_no_mask")
    assert BENCHMARKS["ai2d"].path != BENCHMARKS["ai2d_no_mask"].path
    assert {sample.sample_id for sample in masked}.isdisjoint(x.sample_id for x in unmasked)
    assert [prompt_of(x) for x in masked] == [prompt_of(x) for x in unmasked]


def test_slake_is_asked_in_english_and_reads_its_image_files():
    samples = read("slake")
    assert len(samples) == 5 and all(prompt_of(sample).isascii() for sample in samples)


def facts(**changes):
    plain = {
        "quarantined": 0,
        "over_long": 0,
        "reasons": {},
        "data": "files",
        "limit": None,
        "num_whole": None,
        "num_rows": 1,
    }
    return {**plain, **changes}


def scored(samples, texts, tmp_path, metrics=(), **options):
    predictions = [
        Prediction(sample.sample_id, sample.group_id, "", sample.answer, text, 1, False)
        for sample, text in zip(samples, texts, strict=True)
    ]
    scores, table = score(
        predictions,
        trial_id="base",
        step=0,
        split="x",
        metrics=metrics,
        answer=options.pop("answer", "text"),
        confidence=0.95,
        num_bootstrap=100,
        seed=0,
        seconds=1.0,
        benchmark=facts(**options),
    )
    write_evaluation(tmp_path, scores, table)
    return scores


def test_submissions_are_in_the_authority_s_form(tmp_path):
    texts = ["(B)", "A", " 36 watts", "B.", "none of it", "1"]
    scored(read("mmmu_test"), texts, tmp_path)
    file = write_submission("mmmu", tmp_path / "predictions.parquet")
    assert json.loads(file.read_text()) == {
        "test_Art_1": "B",
        "test_Accounting_2": "A",
        "test_Biology_3": "36 watts",
        "test_Pharmacy_4": "B",
        "test_History_5": "",
        "test_Computer_Science_6": "1",
    }
    scored(read("docvqa_test"), ["a", "b ", "", "c", "d", "e"], tmp_path)
    entries = json.loads(write_submission("docvqa", tmp_path / "predictions.parquet").read_text())
    assert entries[:2] == [
        {"questionId": 49000, "answer": "a"},
        {"questionId": 49001, "answer": "b"},
    ]


def test_domains_of_mmmu_come_with_the_score(tmp_path):
    samples = read("mmmu")
    golds = [reference_of(sample).answers[0] for sample in samples]
    found = scored(samples, golds, tmp_path, ("mmmu@official",)).by_category["mmmu@official"]
    assert found["Business"].num_samples == 1 and len(found) == 12


def test_a_choice_that_names_nothing_is_not_parsed(tmp_path):
    samples = read("ai2d")
    texts = ["A", "I do not know", "B. stem", "", "C", "A or B"]
    scores = scored(samples, texts, tmp_path, ("choice@letter",), answer="choice")
    assert scores.parse_failure_rate == pytest.approx(3 / 6)


def test_prepare_quarantines_a_bad_row_and_the_card_says_so(tmp_path, prepared):
    folder = tmp_path / "own" / "chartqa"
    folder.mkdir(parents=True)
    schema, rows = TABLES["chartqa/test"]
    bad = {**rows[0], "image": {"bytes": b"no picture", "path": None}}
    from pyarrow import Table

    pq.write_table(Table.from_pylist([bad, *rows[1:]], schema=schema), folder / "mine.parquet")
    benchmark, data = prepared("chartqa", str(tmp_path / "own"))
    split = data.split("report")
    assert len(split) == 5 and benchmark.facts["quarantined"] == 1
    assert "mine.parquet:1" in next(iter(benchmark.facts["reasons"]))
    assert benchmark.name == "chartqa" and benchmark.facts["num_whole"] == 2500
    scores = scored(
        read("chartqa")[1:], ["14"] * 5, tmp_path, ("relaxed_accuracy@pix2struct",),
        quarantined=1, reasons=benchmark.facts["reasons"],
    )  # fmt: skip
    card = make_card("m", [scores], 0.95)
    assert card.rows[0].left_out == 1 and "mine.parquet:1" in card.text()
    assert "| x | relaxed_accuracy@pix2struct |" in card.markdown()


def test_copies_of_a_question_count_as_often_as_the_authority_counts_them(prepared):
    benchmark, data = prepared("vqa_rad")
    assert len(data.split("report")) == 6 and not data.quarantine
    assert benchmark.name == "vqa_rad-fixtures"


def test_a_limit_is_a_fixed_nested_choice_and_stands_in_the_name(prepared):
    small, data = prepared("docvqa", limit=2)
    large, _ = prepared("docvqa", limit=4)
    split = data.split("report")
    assert small.name == "docvqa-fixtures-limit-2"
    assert small.facts["digest"] != large.facts["digest"]
    assert set(split.fixed_choice(2)) < set(split.fixed_choice(4))


def test_names_are_found_or_refused_with_the_nearest():
    assert [chosen.name for chosen in find_benchmarks("docvqa, chartqa@human,docvqa")] == [
        "docvqa",
        "chartqa@human",
    ]
    assert len(find_benchmarks("all")) == len(BENCHMARKS)
    for name, near in (("docvka", "docvqa"), ("chartqa@humen", "human"), ("cord@x", "none")):
        with pytest.raises(ConfigError, match=near):
            find_benchmark(name)


def test_data_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="unpack that"):
        suites.sources_of(find_benchmark("slake"), None)
    with pytest.raises(DataError, match="no such folder"):
        suites.sources_of(find_benchmark("cord"), str(tmp_path / "nowhere"))
    (tmp_path / "cord").mkdir()
    with pytest.raises(DataError, match="no data files"):
        suites.sources_of(find_benchmark("cord"), str(tmp_path))
    (tmp_path / "cord" / "train-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match="no file of the split 'test', only of train"):
        suites.sources_of(find_benchmark("cord"), str(tmp_path))


def test_the_hub_s_commit_is_pinned_and_noted(monkeypatch):
    import huggingface_hub

    class Info:
        sha = "0123abc"

    asked = []

    def dataset_info(self, name, **options):
        asked.append(name)
        return Info()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    (docvqa,) = suites.sources_of(find_benchmark("docvqa"), None)
    (mmmu,) = suites.sources_of(find_benchmark("mmmu"), None)
    assert asked == ["lmms-lab-encoder/DocVQA", "MMMU/MMMU"]
    assert docvqa.revision == mmmu.revision == "0123abc"
    assert (docvqa.dataset_split, mmmu.dataset_split) == ("validation", None)


def test_an_adapter_is_put_on_the_base_and_taken_off_again(prepared, tiny_base, tmp_path):
    base = tiny_base("idefics3")
    lora = LoraConfig(rank=2)
    model = attach(base.model, base.family, lora, seed=0)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=3.0)
    save_adapter(model, tmp_path / "mine")
    base.model = detach(model)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    benchmark, _ = prepared("chartqa", limit=3)
    folder, reports = SweepFolder(tmp_path / "out"), []
    worker = SimpleNamespace(
        base=base,
        experiment=plain_experiment(),
        world=World(),
        folder=folder,
        beat=lambda: True,
        note_own=lambda message: None,
        told=lambda *_, **__: "",
        features=None,
        report=lambda job, report: reports.append(report),
    )
    adapter = suites.check_adapter(tmp_path / "mine", worker.experiment)
    answers = {}
    for scoring in (Scoring(None, "", 0), Scoring(None, "", 0, adapter=adapter)):
        (scoring,) = suites.scorings_of(scoring, [benchmark])
        run_evaluate(worker, scoring.job())
        file = scoring.scores_file(folder).with_name("predictions.parquet")
        answers[scoring.trial_id] = pq.read_table(file)["prediction"].to_pylist()
    assert [report["done"] for report in reports] == [True, True]
    assert set(answers) == {"base", "adapter-mine"} and len(answers["base"]) == 3
    assert answers["base"] != answers["adapter-mine"]
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="not an adapter"):
        suites.check_adapter(tmp_path, worker.experiment)


def test_scores_of_other_data_or_another_adapter_are_not_taken_for_these(prepared, tmp_path):
    benchmark, _ = prepared("cord")
    (scoring,) = suites.scorings_of(Scoring(None, "", 0), [benchmark])
    folder = SweepFolder(tmp_path / "out")
    suites.forget_stale(folder, scoring)
    scores = scoring.scores_file(folder)
    scores.write_text("{}")
    suites.forget_stale(folder, scoring)
    assert scores.exists()
    other = replace(benchmark, facts={**benchmark.facts, "digest": "other"})
    suites.forget_stale(folder, replace(scoring, benchmark=other))
    assert not scores.exists()


@pytest.mark.parametrize(
    "command, why",
    [
        (["x", "--limit", "3"], "--limit has no effect without --benchmarks"),
        (["x", "--benchmarks", "docvka"], "did you mean 'docvqa'"),
        (["x", "--benchmarks", "cord", "--split", "report"], "exclude each other"),
        (["x", "--benchmarks", "cord", "--trial", "t0001"], "is a model"),
        (["x", "--benchmarks", "cord", "lora.rank=3"], "lora.rank has no effect"),
        (["x", "--benchmarks", "cord", "train.num_worker=3"], "did you mean 'train.num_workers'"),
        (["x", "--benchmarks", "cord", "seed=-1"], "override seed=-1"),
    ],
)
def test_wrong_use_of_evaluate_is_one_clear_line(command, why):
    with pytest.raises(ConfigError, match=why):
        cli.main(["evaluate", *command], standalone_mode=False)


@pytest.mark.parametrize(
    "evaluation, why",
    [
        ({"guard": ["docvka"]}, "did you mean 'docvqa'"),
        ({"guard": ["docvqa"]}, "is on the hub"),
        ({"guard_samples": 3}, "guard is empty"),
        ({"guard": ["cord", "cord"], "guard_data": "x"}, "distinct"),
    ],
)
def test_a_guard_that_cannot_be_read_is_refused_with_the_experiment(evaluation, why):
    with pytest.raises(ValueError, match=why):
        plain_experiment(evaluation=evaluation)


def test_the_docs_list_every_benchmark_with_its_data_and_metrics():
    docs = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name, entry in BENCHMARKS.items():
        (row,) = [line for line in docs.splitlines() if line.startswith(f"| `{name}` |")]
        shown = [entry.path.removeprefix("hf://datasets/"), *entry.metrics, entry.prompt_source]
        assert all(text in row for text in shown)
        assert f"| {entry.max_new_tokens} | " in row


def test_one_s_own_benchmark_needs_no_code(tmp_path, prepared):
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"photo": f"{n}.png", "ask": f"Which {n}?", "gold": ["x", "y"], "shop": n})
            + "\n"
            for n in range(3)
        )
    )
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(draw(str(number))["bytes"])
    own = {
        "path": "rows.jsonl",
        "columns": {"images": ["photo"], "question": "ask", "answers": "gold", "group": "shop"},
        "prompt": "{question} One word.",
        "metrics": ["anls@rrc"],
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(own))
    benchmark, data = prepared(str(file), None)
    split = data.split("report")
    assert benchmark.name == "mine" and len(split) == 3
    assert split.text(0, "prompt") == "Which 0? One word."
    assert read_reference(split.text(0, "reference")).answers == ("x", "y")
    for change, why in (
        ({"metrics": ["anls@rcc"]}, "anls@rrc"),
        ({"promt": "x"}, "did you mean 'prompt'"),
        ({"prompt": "{choices} {question}"}, "columns.choices is None"),
        ({"columns": {"imges": ["x"]}}, "did you mean 'images'"),
    ):
        file.write_text(yaml.safe_dump({**own, **change}))
        with pytest.raises(ConfigError, match=why):
            find_benchmark(str(file))
