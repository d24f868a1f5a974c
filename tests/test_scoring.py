"""Scoring predictions, the files it leaves, and reading them back as a matrix."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.matrix import read_matrix
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.evaluate.scoring import (
    Prediction,
    rescore,
    score,
    write_evaluation,
)
from raytune_vlm.evaluate.statistics import paired_test
from raytune_vlm.records import PREDICTION_COLUMNS, CategoryScore, Scores, read_json
from raytune_vlm.references import Reference

TEA = "<s_menu><s_nm>TEA</s_nm></s_menu>"
PLAIN = [name for name, metric in METRICS.items() if not metric.needs_extraction]
INTERVAL: dict[str, Any] = {"confidence": 0.9, "num_bootstrap": 100, "seed": 3}


def prediction(number: int, text: str, reference: str = TEA, **changes: Any) -> Prediction:
    made = Prediction(f"s{number}", f"g{number // 2}", "Read it.", reference, text, 7, False)
    return dataclasses.replace(made, **changes)


PREDICTIONS = [
    prediction(0, TEA),
    prediction(1, "<s_menu><s_nm>TEE</s_nm></s_menu>"),
    prediction(2, ""),
    prediction(3, "no tags", truncated=True),
]


def run(predictions: list[Prediction], **changes: Any) -> tuple[Scores, pa.Table]:
    options: dict[str, Any] = {
        "trial_id": "t000",
        "step": 20,
        "split": "select",
        "metrics": PLAIN,
        "answer": "json_tags",
        "seconds": 1.5,
        **INTERVAL,
        **changes,
    }
    return score(predictions, **options)


def test_scores_and_rates() -> None:
    scores, table = run(PREDICTIONS)
    assert (scores.num_samples, scores.num_groups) == (4, 2)
    assert (scores.trial_id, scores.step, scores.split, scores.seconds) == (
        "t000",
        20,
        "select",
        1.5,
    )
    assert scores.parse_failure_rate == 0.5
    assert scores.empty_rate == 0.25
    assert scores.truncation_rate == 0.25
    assert scores.metrics["exact_match@strip"].value == 0.25
    assert table["parsed"].to_pylist() == [True, True, False, False]


def test_plain_text_is_parsed_when_it_is_not_empty() -> None:
    scores, table = run(PREDICTIONS, answer="text", metrics=["exact_match@strip"])
    assert table["parsed"].to_pylist() == [True, True, False, True]
    assert scores.parse_failure_rate == scores.empty_rate == 0.25


def test_table_has_the_promised_columns_and_gives_the_aggregates() -> None:
    scores, table = run(PREDICTIONS)
    expected = [*PREDICTION_COLUMNS]
    for name in PLAIN:
        expected += [name, f"{name}/weight"] + [f"{name}/sums"] * bool(METRICS[name].combine)
    assert table.column_names == expected
    for name, found in scores.metrics.items():
        if combine := METRICS[name].combine:
            total = np.sum(table[f"{name}/sums"].to_pylist(), axis=0)
            assert found.value == pytest.approx(combine(total))
            continue
        values, weights = table[name].to_numpy(), table[f"{name}/weight"].to_numpy()
        assert values.dtype == weights.dtype == np.float64
        assert found.value == pytest.approx((values * weights).sum() / weights.sum())


def test_refuses_repeats_nothing_and_unknown_metrics() -> None:
    with pytest.raises(
        EvaluationError, match=r"t000 on select: 1 samples stand more than once.*s0"
    ):
        run([*PREDICTIONS, prediction(0, "again")])
    with pytest.raises(EvaluationError, match="no predictions"):
        run([])
    with pytest.raises(EvaluationError, match="did you mean 'cer@micro'"):
        run(PREDICTIONS, metrics=["cer@macro"])


def test_files_round_trip(tmp_path: Path) -> None:
    scores, table = run([*PREDICTIONS, prediction(4, "\ud800 抹茶 \x00")])
    folder = tmp_path / "evaluations" / "step"
    write_evaluation(folder, scores, table)
    assert Scores.from_json(read_json(folder / "scores.json")) == scores
    json.loads((folder / "scores.json").read_text(), parse_constant=pytest.fail)
    read = pq.read_table(folder / "predictions.parquet")
    assert read.equals(table)
    assert read["prediction"].to_pylist()[4] == "? 抹茶 \x00"
    assert sorted(file.name for file in folder.iterdir()) == ["predictions.parquet", "scores.json"]


def test_torn_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, table = run(PREDICTIONS)
    write_evaluation(tmp_path, scores, table)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(table: pa.Table, stream: Any) -> None:
        stream.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="no space"):
        write_evaluation(tmp_path, *run(PREDICTIONS[:2]))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_rescore_needs_only_the_predictions(tmp_path: Path) -> None:
    scores, table = run(PREDICTIONS)
    write_evaluation(tmp_path, scores, table)
    (tmp_path / "scores.json").unlink()
    assert rescore(tmp_path, **INTERVAL) == scores
    assert Scores.from_json(read_json(tmp_path / "scores.json")) == scores
    assert pq.read_table(tmp_path / "predictions.parquet").equals(table)


def test_rescore_with_other_metrics(tmp_path: Path) -> None:
    scores, table = run(PREDICTIONS, metrics=["cer@micro"])
    write_evaluation(tmp_path, scores, table)
    again = rescore(tmp_path, metrics=["nted@donut"], **INTERVAL)
    assert again.metrics == {"nted@donut": run(PREDICTIONS)[0].metrics["nted@donut"]}
    assert again.parse_failure_rate == scores.parse_failure_rate


def test_rescore_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot read.*predictions.parquet"):
        rescore(tmp_path, **INTERVAL)
    file = tmp_path / "predictions.parquet"
    pq.write_table(run(PREDICTIONS)[1].replace_schema_metadata(None), file)
    with pytest.raises(EvaluationError, match="does not hold its trial"):
        rescore(tmp_path, **INTERVAL)
    pq.write_table(run(PREDICTIONS)[1].drop_columns(["reference"]), file)
    with pytest.raises(EvaluationError, match="does not hold the columns reference"):
        rescore(tmp_path, **INTERVAL)


def written(folder: Path, predictions: list[Prediction], **changes: Any) -> Path:
    write_evaluation(folder, *run(predictions, **changes))
    return folder / "predictions.parquet"


def test_matrix_is_aligned_by_sample(tmp_path: Path) -> None:
    first = written(tmp_path / "a", PREDICTIONS)
    changed = [prediction(number, TEA if number == 3 else "x") for number in (3, 1, 0, 2)]
    second = written(tmp_path / "b", changed)
    values, weights, groups, sample_ids = read_matrix([first, second], "exact_match@strip")
    assert sample_ids == ["s0", "s1", "s2", "s3"]
    assert groups == ["g0", "g0", "g1", "g1"]
    assert values.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert weights.tolist() == [[1] * 4] * 2


def test_matrix_refuses_what_does_not_fit(tmp_path: Path) -> None:
    first = written(tmp_path / "a", PREDICTIONS)
    fewer = written(tmp_path / "b", PREDICTIONS[:3])
    with pytest.raises(EvaluationError, match=r"a/pred.* and .*b/pred.*1 only in the first.*'s3'"):
        read_matrix([first, fewer], "cer@micro")
    moved = [dataclasses.replace(PREDICTIONS[0], group_id="other"), *PREDICTIONS[1:]]
    other = written(tmp_path / "c", moved)
    with pytest.raises(EvaluationError, match="group the sample 's0' differently"):
        read_matrix([first, other], "cer@micro")
    lacking = written(tmp_path / "d", PREDICTIONS, metrics=["cer@micro"])
    with pytest.raises(EvaluationError, match=r"d/pred.* has no column 'nted@donut'"):
        read_matrix([first, lacking], "nted@donut")
    with pytest.raises(EvaluationError, match="did you mean 'cer@micro'"):
        read_matrix([first], "cer@mikro")
    with pytest.raises(EvaluationError, match="cannot read"):
        read_matrix([tmp_path / "none.parquet"], "cer@micro")
    with pytest.raises(EvaluationError, match="no predictions to compare"):
        read_matrix([], "cer@micro")
    table = pq.read_table(first)
    pq.write_table(pa.concat_tables([table, table]), first)
    with pytest.raises(EvaluationError, match="more than once"):
        read_matrix([first], "cer@micro")


def test_scoring_imports_nothing_heavy() -> None:
    code = (
        "import sys, raytune_vlm.evaluate.scoring\n"
        "print({'torch', 'ray', 'transformers', 'peft', 'scipy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


CAPTIONS = [
    ("a man rides a bike down a street", "a man is riding a bike down the street"),
    ("two dogs play in the grass", "two dogs are playing in the grass"),
    ("a red bus", "a red bus at the stop"),
    ("a cat on the table", "a plate of food on a table"),
]


def test_a_corpus_metric_is_kept_by_its_sums(tmp_path: Path) -> None:
    rows = [prediction(number, *texts) for number, texts in enumerate(CAPTIONS)]
    scores, table = run(rows, metrics=["bleu2@coco", "cider@coco"])
    found = scores.metrics["bleu2@coco"]
    assert found.lower <= found.value <= found.upper
    assert found.value != pytest.approx(np.mean(table["bleu2@coco"].to_numpy()))
    write_evaluation(tmp_path, scores, table)
    sums, weights, groups, _ = read_matrix([tmp_path / "predictions.parquet"] * 2, "bleu2@coco")
    assert (sums.shape, weights.shape, len(groups)) == ((2, 4, 11), (2, 4), 4)
    test = paired_test(
        sums, weights, groups, metric="bleu2@coco", first="a", second="b",
        combine=METRICS["bleu2@coco"].combine, **INTERVAL,
    )  # fmt: skip
    assert (test.difference, test.p_value, test.num_samples) == (0, 1, 4)
    assert rescore(tmp_path, **INTERVAL) == scores


def test_bleu_of_nothing_right_keeps_some_doubt() -> None:
    rows = [prediction(number, "x", "y", group_id=str(number)) for number in range(20)]
    found = run(rows, metrics=["bleu1@coco"])[0].metrics["bleu1@coco"]
    assert (found.value, found.upper) == (pytest.approx(0), pytest.approx(1 - 0.1 ** (1 / 20)))


def test_scores_by_category_and_group() -> None:
    subjects = ["Math", "Physics", "Physics", "History", ""]
    rows = [
        prediction(number, text, Reference((gold,), ("x", "y"), category=subject).to_text())
        for number, (text, gold, subject) in enumerate(zip("ABBAA", "AABBA", subjects, strict=True))
    ]
    scores, _ = run(rows, metrics=["mmmu@official", "exact_match@strip", "bleu1@coco"])
    assert scores.metrics["mmmu@official"].value == 0.6
    assert scores.by_category["mmmu@official"] == {
        "Science": CategoryScore(pytest.approx(2 / 3), 3),
        "Humanities and Social Science": CategoryScore(0, 1),
        "History": CategoryScore(0, 1),
        "Math": CategoryScore(1, 1),
        "Physics": CategoryScore(0.5, 2),
    }
    assert set(scores.by_category["bleu1@coco"]) == {"History", "Math", "Physics"}
    assert Scores.from_json(json.loads(json.dumps(dataclasses.asdict(scores)))) == scores
    assert run(PREDICTIONS)[0].by_category == {}


def test_a_metric_that_fits_no_sample_is_told() -> None:
    rows = [prediction(0, "yes", Reference(("yes",), type="closed").to_text())]
    assert run(rows, metrics=["medical_closed@exact"])[0].metrics["medical_closed@exact"].value == 1
    with pytest.raises(
        EvaluationError, match=r"medical_open@llava_med_f1 has no score for any of 1"
    ):
        run(rows, metrics=["medical_open@llava_med_f1"])


def test_samples_that_overlap_the_training_data_are_left_out_beside_the_whole(
    tmp_path: Path,
) -> None:
    names = ["exact_match@strip", "bleu4@coco"]
    scores, table = run(PREDICTIONS, metrics=names, overlapping=["s0", "elsewhere"])
    rest, _ = run(PREDICTIONS[1:], metrics=names)
    assert scores.clean is not None
    assert (scores.clean.num_samples, scores.clean.num_groups) == (3, 2)
    assert scores.clean.metrics == rest.metrics
    assert scores.metrics["exact_match@strip"].value == 0.25
    assert run(PREDICTIONS, metrics=names)[0].clean is None
    nothing, _ = run(PREDICTIONS, metrics=names, overlapping=["s0", "s1", "s2", "s3"])
    assert nothing.clean is not None and nothing.clean.metrics == {}
    write_evaluation(tmp_path, scores, table)
    assert Scores.from_json(read_json(tmp_path / "scores.json")) == scores
    assert rescore(tmp_path, **INTERVAL) == scores
