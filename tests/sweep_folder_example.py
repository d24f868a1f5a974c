"""Builds realistic sweep folders for the tests of the report, without training anything.

`python tests/sweep_folder_example.py FOLDER` writes one to look at.
"""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.json_tokens import json2token
from raytune_vlm.records import (
    BASE_TRIAL,
    CleanScores,
    DataManifest,
    MetricEstimate,
    PairedTest,
    Quarantined,
    Replicate,
    Scores,
    Split,
    SplitStatistics,
    SweepFolder,
    SweepResult,
    TrialRecord,
    write_json,
    write_text,
)

State = Literal["finished", "running", "empty", "single", "unclear"]
Mode = Literal["max", "min"]

RUNGS = (50, 150, 400)
NUM_REPORT = 40
MAX_LENGTH = 1792
START = 1_790_000_000.0
_ITEMS = ("ICED TEA", "NASI GORENG", "LATTE (L)", "BUN", "AYAM BAKAR", "ES JERUK", "MIE KUAH")


@dataclass(frozen=True)
class Example:
    """The knobs of an example folder."""

    root: Path
    mode: Mode = "max"
    state: State = "finished"
    hostile: bool = False
    """Put HTML and scripts wherever text can come from outside."""

    @property
    def metric(self) -> str:
        return "nted@donut" if self.mode == "max" else "cer@micro"

    @property
    def other_metric(self) -> str:
        return "field_f1@donut" if self.mode == "max" else "exact_match@strip"


def build_example(
    root: Path, *, mode: Mode = "max", state: State = "finished", hostile: bool = False
) -> SweepFolder:
    """Write a sweep folder: 16 trials on receipts (`max`) or text lines (`min`)."""
    example = Example(root, mode, state, hostile)
    folder = SweepFolder(root)
    _write_experiment(example, folder)
    if state == "empty":
        return folder
    _write_data(example, folder)
    trials = _trials(example)
    for record, quality in trials:
        _write_trial(example, folder, record, quality)
    _write_scores(example, folder, BASE_TRIAL, "select", 0, 0.34)
    _write_ledger(folder, [record for record, _ in trials])
    if state != "running":
        _write_result(example, folder, trials)
    return folder


def experiment(example: Example) -> ExperimentConfig:
    """The experiment of the example."""
    is_max = example.mode == "max"
    source = {"type": "cord", "path": "cord-v2/*.parquet"} if is_max else _sroie()
    return ExperimentConfig.model_validate(
        {
            "name": "receipts-lora" if is_max else "lines-lora",
            "model": {"name": "Qwen/Qwen2.5-VL-3B-Instruct", "dtype": "bfloat16"},
            "data": {
                "sources": [source],
                "max_bad_fraction": 0.02,
                "max_length": MAX_LENGTH,
                "over_long": "truncate",
                "deduplicate": True,
            },
            "train": {"max_steps": 400},
            "evaluation": {
                "metrics": [example.metric, example.other_metric],
                "answer": "json_tags" if is_max else "text",
            },
            "sweep": {
                "num_trials": 16,
                "search_space": {
                    "lora.rank": {"type": "choice", "values": [4, 8, 16, 32, 64]},
                    "train.learning_rate": {"type": "loguniform", "lower": 3e-5, "upper": 1e-2},
                    "lora.scope": {
                        "type": "choice",
                        "values": ["text", "text+projector", "text+projector+vision"],
                    },
                    "lora.dropout": {"type": "uniform", "lower": 0.0, "upper": 0.2},
                },
            },
        }
    )


def _sroie() -> dict[str, str]:
    return {"type": "sroie", "path": "sroie"}


def _write_experiment(example: Example, folder: SweepFolder) -> None:
    resolved = experiment(example)
    write_json(
        folder.experiment_file,
        {
            "fingerprint": resolved.fingerprint(),
            "experiment": resolved.model_dump(mode="json"),
            "versions": {"python": "3.11.7", "torch": "2.9.1", "ray": "2.52.0", "peft": "0.18.0"},
            "command": f"raytune-vlm sweep experiments/{resolved.name}.yaml train.max_steps=400",
        },
    )


def _write_data(example: Example, folder: SweepFolder) -> None:
    reasons = ["image is truncated", "no labelled token", "image has 61,000,000 pixels, limit 50e6"]
    if example.hostile:
        reasons[0] = "<img src=x onerror=alert(2)>"
    stem = "<s>stem</s>" if example.hostile else "train"
    rows = [
        Quarantined(f"cord-v2/{stem}-0000{i % 4}.parquet:{13 * i + 7}", reasons[i % 3], "train")
        for i in range(7)
    ]
    lines = "".join(pyjson(asdict(row)) + "\n" for row in rows)
    write_text(folder.quarantine_file, lines)
    reason = "3.41 GB of pixels, within 212 GB of free disk"
    manifest = DataManifest(
        digest="9f2c41d07be86a35",
        store="runs/store/9f2c41d07be86a35",
        splits={
            "train": _statistics(819, 790, 984, quarantined=7, over_long=3, duplicates=19),
            "select": _statistics(100, 100, 820),
            "report": _statistics(NUM_REPORT, NUM_REPORT, 820),
        },
        quarantine_reasons={reason: sum(r.reason == reason for r in rows) for reason in reasons},
        overlap={"train/report": 6, "select/report": 2},
        overlap_kinds={
            "train/report": {"image": 1, "near_image": 5},
            "select/report": {"group": 2},
        },
        seconds=94.2,
        tier_reason=f"<u>{reason}</u>" if example.hostile else reason,
    )
    write_json(folder.manifest_file, manifest)


def _statistics(
    seen: int,
    used: int,
    middle: int,
    *,
    quarantined: int = 0,
    over_long: int = 0,
    duplicates: int = 0,
) -> SplitStatistics:
    """A split whose samples have lengths around `middle`; those beyond the limit were cut."""
    raw = numpy.random.default_rng(used).gamma(9.0, middle / 9.0, used)
    lengths = numpy.minimum(raw.astype(int), MAX_LENGTH)
    top = int(lengths.max())
    counts, edges = numpy.histogram(lengths, bins=24, range=(0, top))
    return SplitStatistics(
        num_seen=seen,
        num_used=used,
        num_quarantined=quarantined,
        num_dropped_over_long=over_long,
        num_groups=36 if used == NUM_REPORT else used,
        num_images=used,
        max_length=top,
        mean_length=float(lengths.mean()),
        mean_labelled=164.2 if middle > 900 else 0.0,
        mean_media=0.72 * float(lengths.mean()),
        num_truncated=int((raw > MAX_LENGTH).sum()),
        num_duplicates=duplicates,
        length_counts=counts.tolist(),
        length_edges=[round(float(edge), 1) for edge in edges],
    )


def pyjson(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False)


def _trials(example: Example) -> list[tuple[TrialRecord, float]]:
    """Records with the quality (0 to 1) that their recipe reaches when fully trained."""
    generator = numpy.random.default_rng(7)
    scopes = ("text", "text+projector", "text+projector+vision")
    trials = []
    number_of_trials = 1 if example.state == "single" else 16
    for number in range(number_of_trials):
        rank = int(generator.choice([4, 8, 16, 32, 64]))
        rate = float(10 ** generator.uniform(-4.5, -2.0))
        scope, dropout = scopes[int(generator.integers(3))], float(generator.uniform(0, 0.2))
        if number == 0:
            rank, rate, scope, dropout = 16, 1e-3, "text", 0.0
        recipe = {
            "lora.rank": rank,
            "train.learning_rate": rate,
            "lora.scope": scope,
            "lora.dropout": dropout,
        }
        quality = 0.76 - 0.14 * (math.log10(rate) + 3.3) ** 2 + 0.012 * math.log2(rank)
        quality += 0.03 * scopes.index(scope) + float(generator.normal(0, 0.012))
        if example.state == "unclear":
            quality = 0.36 + 0.02 * quality
        trials.append((_record(example, number, recipe, quality), quality))
    return trials


def _record(example: Example, number: int, recipe: dict[str, Any], quality: float) -> TrialRecord:
    rank, scope = int(recipe["lora.rank"]), str(recipe["lora.scope"])
    sizes = {"text": 926_720, "projector": 61_440, "vision": 412_160}
    by_scope = {part: rank * sizes[part] for part in scope.split("+")}
    step = 400 if quality > 0.73 or number in (0, 3) else 150 if quality > 0.62 else 50
    trained, evaluated = 1.9 * step * (1 + 0.004 * rank), 21.0 * RUNGS.index(step) + 18.0
    record = TrialRecord(
        trial_id=f"trial_{number:03d}",
        number=number,
        recipe=recipe,
        status="finished" if step == 400 else "stopped",
        step=step,
        max_steps=400,
        seconds=trained + evaluated + 9.4 + number % 5,
        train_seconds=trained,
        evaluate_seconds=evaluated,
        trainable_parameters=sum(by_scope.values()),
        trainable_by_scope=by_scope,
        audit={
            "finite_gradients": {"passed": True, "tensors": 504},
            "adapter_has_effect": {"passed": True, "difference": 0.0123 + 0.001 * number},
            "image_has_effect": {"passed": True, "difference": 0.41},
            "reload_equal": True,
        },
    )
    if number == 11:
        message = "TrialInfeasible: out of memory at micro-batch 1 (needs 81.2 GiB of 79.6 GiB)"
        if example.hostile:
            message = '<b onclick="alert(3)">boom</b> & <script>alert(4)</script>'
        return replace(record, status="failed", step=0, failure=message, audit={})
    if number == 13:
        audit = {**record.audit, "image_has_effect": {"passed": False, "difference": 0.0}}
        failure = "TrialDiverged: loss is not finite at step 61"
        return replace(record, status="failed", step=50, audit=audit, failure=failure)
    if example.state == "running" and number >= 13:
        return replace(record, status="running", step=min(step, 150))
    return record


def _write_trial(
    example: Example, folder: SweepFolder, record: TrialRecord, quality: float
) -> None:
    generator = numpy.random.default_rng(record.number)
    paths = folder.trial(record.trial_id)
    write_json(paths.record_file, record)
    rate = float(record.recipe["train.learning_rate"])
    lines = []
    for step in range(5, record.step + 1, 5):
        loss = 2.4 * math.exp(-step / 40) + 0.9 - 0.75 * quality * (1 - math.exp(-step / 120))
        loss *= 1 + float(generator.normal(0, 0.03))
        row = {"step": step, "loss": loss, "grad_norm": 0.8, "learning_rate": rate, "tokens": 2600}
        lines.append(pyjson(row) + "\n")
    write_text(paths.metrics_file, "".join(lines))
    for rung in RUNGS:
        if rung <= record.step:
            reached = 0.34 + (quality - 0.34) * (1 - math.exp(-rung / 75))
            reached += float(generator.normal(0, 0.006)) - (
                0.02 if rung == 400 and record.number == 5 else 0
            )
            _write_scores(example, folder, record.trial_id, "select", rung, reached)


def _estimate(value: float, width: float) -> MetricEstimate:
    low, high = max(0.0, value - width), min(1.0, value + width)
    return MetricEstimate(value, low, high, width / 1.96)


def _write_scores(
    example: Example, folder: SweepFolder, trial_id: str, split: Split, step: int, quality: float
) -> None:
    """Scores of a quality; errors of 1 - quality where less is better."""
    better, other = (quality, quality - 0.08) if example.mode == "max" else (1 - quality, quality)
    number = 100 if split == "select" else NUM_REPORT
    width = 0.35 / math.sqrt(number)
    scores = Scores(
        trial_id=trial_id,
        step=step,
        split=split,
        num_samples=number,
        num_groups=100 if split == "select" else 36,
        metrics={
            example.metric: _estimate(better, width),
            example.other_metric: _estimate(other, width * 1.2),
        },
        parse_failure_rate=max(0.0, 0.4 - 0.45 * quality),
        empty_rate=0.0,
        truncation_rate=0.025 if trial_id == BASE_TRIAL else 0.0,
        seconds=20.5,
        clean=CleanScores(34, 31, {example.metric: _estimate(better - 0.016, width * 1.1)})
        if split == "report"
        else None,
    )
    write_json(folder.trial(trial_id).evaluation(split, step) / "scores.json", scores)


def _write_ledger(folder: SweepFolder, records: list[TrialRecord]) -> None:
    events: list[dict[str, Any]] = []
    time = START
    for record in records:
        head = {"number": record.number, "recipe": record.recipe}
        told = [("proposed", head), ("started", {"step": 0})]
        for rung in (rung for rung in RUNGS if rung <= record.step):
            metrics = next(
                s for s in folder.trial(record.trial_id).scores("select") if s.step == rung
            )
            values = {name: entry.value for name, entry in metrics.metrics.items()}
            told.append(("scored", {"step": rung, "scores": values}))
        if record.status != "running":
            told.append((record.status, {"step": record.step}))
        for kind, fields in told:
            time += record.seconds / len(told)
            event = {"event": kind, "trial_id": record.trial_id, **fields}
            events.append({"seq": len(events) + 1, "time": time, **event})
    write_text(folder.ledger_file, "".join(pyjson(event) + "\n" for event in events))


def _write_result(
    example: Example, folder: SweepFolder, trials: list[tuple[TrialRecord, float]]
) -> None:
    finished = [(r, q) for r, q in trials if r.status == "finished"]
    winner, quality = max(finished, key=lambda pair: pair[1])
    near = [r for r, q in trials if r.status != "failed" and q > quality - 0.06]
    near.sort(key=lambda record: record.trainable_parameters)
    second = max(
        (r for r, _ in finished if r is not winner), key=lambda r: r.seconds, default=winner
    )
    step = winner.step
    naive = folder.trial(winner.trial_id).scores("select")[-1].metrics[example.metric].value
    on_report = {"base": 0.351, "default": trials[0][1] - 0.02, "winner": quality - 0.025}
    ids = {"base": BASE_TRIAL, "default": trials[0][0].trial_id, "winner": winner.trial_id}
    for role, trial_id in ids.items():
        at = 0 if role == "base" else 400 if role == "default" else step
        _write_scores(example, folder, trial_id, "report", at, on_report[role])
        _write_predictions(example, folder, trial_id, at, on_report[role])
    sign = 1 if example.mode == "max" else -1
    loss = -0.017 * sign

    def paired(first: str, second: str, difference: float, width: float, p: float) -> PairedTest:
        low, high = sorted((sign * difference - width, sign * difference + width))
        return PairedTest(
            example.metric,
            first,
            second,
            sign * difference,
            low,
            high,
            p,
            NUM_REPORT,
            adjusted_p=min(1.0, 3 * p),
            num_tests=3,
        )

    gain = on_report["winner"] - on_report["base"]
    lead = on_report["winner"] - on_report["default"]
    clear = example.state != "unclear"
    result = SweepResult(
        metric=example.metric,
        mode=example.mode,
        winner=winner.trial_id,
        winner_step=step,
        default=trials[0][0].trial_id,
        naive=naive,
        corrected=_estimate(naive + loss, 0.034),
        report=ids,
        paired=[
            paired(winner.trial_id, BASE_TRIAL, gain, 0.06, 0.0004 if clear else 0.41),
            paired(winner.trial_id, ids["default"], lead, 0.031, 0.038),
            paired(winner.trial_id, near[0].trial_id, 0.008, 0.019, 0.38),
            replace(
                paired(winner.trial_id, BASE_TRIAL, sign * 0.15, 0.12, 0.03),
                metric=example.other_metric,
                only_first=9,
                only_second=3,
                mcnemar_p=0.146,
            ),
        ],
        indistinguishable=[record.trial_id for record in near],
        num_report_touches=3,
        seconds=2 * 3600 + 5 * 60 + 12.0,
        replicates=[
            Replicate(1, naive - 0.02 * sign, trial_id=winner.trial_id),
            Replicate(2, None, "diverged: not finite", winner.trial_id),
            Replicate(3, naive - 0.035 * sign, trial_id=winner.trial_id),
            Replicate(1, naive - 0.009 * sign, trial_id=second.trial_id),
            Replicate(2, naive - 0.011 * sign, trial_id=second.trial_id),
            Replicate(3, naive - 0.004 * sign, trial_id=second.trial_id),
        ],
        replicated={winner.trial_id: naive, second.trial_id: naive - 0.006 * sign},
        against_base=[
            replace(
                paired(record.trial_id, BASE_TRIAL, trial_quality - 0.34, 0.07, 0.0005),
                adjusted_p=0.007 if trial_quality > 0.45 else 0.31,
                num_tests=len(trials),
                num_samples=100,
            )
            for record, trial_quality in trials
            if record.status != "failed"
        ],
        detectable={"select": 0.071, "report": 0.104},
        clean={
            "base": _estimate(0.348 if sign > 0 else 0.652, 0.06),
            "winner": _estimate(quality - 0.041 if sign > 0 else 1.041 - quality, 0.06),
        },
        num_clean=34,
    )
    write_json(folder.result_file, result)
    write_text(folder.best / "README.md", "placeholder\n")


def _truth(example: Example, index: int) -> Any:
    generator = numpy.random.default_rng(1000 + index)
    names = [str(name) for name in generator.choice(_ITEMS, size=int(generator.integers(1, 4)))]
    prices = [int(generator.integers(8, 60)) * 500 for _ in names]
    if example.mode == "min":
        return f"{sum(prices) / 1000:.2f}"
    menu = [
        {"nm": name, "cnt": "1 x", "price": f"{p:,}"} for name, p in zip(names, prices, strict=True)
    ]
    cash = -(-sum(prices) // 50000) * 50000
    total = {"total_price": f"{sum(prices):,}", "cashprice": f"{cash:,}"}
    return {"menu": menu, "total": total}


def _spoil(truth: Any, generator: numpy.random.Generator, errors: float) -> Any:
    """The truth with some characters of its values misread and some keys lost."""
    if isinstance(truth, dict):
        kept = {k: v for k, v in truth.items() if generator.random() > 0.25 * errors}
        return {key: _spoil(value, generator, errors) for key, value in kept.items()}
    if isinstance(truth, list):
        return [_spoil(entry, generator, errors) for entry in truth]
    letters = list(str(truth))
    if letters and generator.random() < errors:
        place = int(generator.integers(len(letters)))
        letters[place] = {"0": "6", "5": "S", "A": "4", "E": "F"}.get(letters[place], "?")
    return "".join(letters)


def _write_predictions(
    example: Example, folder: SweepFolder, trial_id: str, step: int, quality: float
) -> None:
    rows: list[dict[str, Any]] = []
    for index in range(NUM_REPORT):
        generator = numpy.random.default_rng([index, int(quality * 1e6)])
        truth = _truth(example, index)
        errors = 0.75 * (1 - quality) if generator.random() > 0.3 * quality else 0.0
        spoiled = _spoil(truth, generator, min(0.9, errors * 1.4))
        right = spoiled == truth
        score = 1.0 if right else min(0.97, max(0.0, float(generator.normal(quality, 0.08))))
        reference, prediction = json2token(truth), json2token(spoiled)
        if example.mode == "min":
            score = round(1 - score, 3)
        if trial_id == BASE_TRIAL and index == 4:
            prediction, score = "The receipt shows tea.", 0.0 if example.mode == "max" else 1.0
        if example.hostile and index == 4:
            prediction = "<script>alert(1)</script>"
        rows.append(
            {
                "sample_id": f"{index * 2654435761 % 2**32:08x}{index:08x}",
                "group_id": f"doc{index}",
                "prompt": "Parse this document into JSON tags.",
                "reference": reference,
                "prediction": prediction,
                "parsed": "",
                "num_tokens": len(prediction) // 3,
                "truncated": False,
                example.metric: score,
                f"{example.metric}/weight": 1.0,
            }
        )
        _write_image(folder, rows[-1]["sample_id"], truth)
    file = folder.trial(trial_id).evaluation("report", step) / "predictions.parquet"
    origin = {"trial_id": trial_id, "step": step, "split": "report", "seconds": 20.5}
    origin |= {"answer": "json_tags" if example.mode == "max" else "text", "overlapping": []}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"raytune_vlm": pyjson(origin)})
    pyarrow.parquet.write_table(table, file)


def _write_image(folder: SweepFolder, sample_id: str, truth: Any) -> None:
    file = folder.gallery / f"{sample_id}.jpg"
    if file.exists():
        return
    lines = ["   KEDAI SINAR", "  Jl. Merdeka 17", "-" * 26]
    if isinstance(truth, dict):
        for item in truth["menu"]:
            lines += [item["nm"], f"  {item['cnt']:<8}{item['price']:>15}"]
        lines += ["-" * 26, *(f"{k.upper():<14}{v:>12}" for k, v in truth["total"].items())]
    else:
        lines = [f"   TOTAL  {truth}"]
    image = Image.new("RGB", (220, 40 + 18 * len(lines)), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((16, 18 + 18 * row), line, fill=(50, 48, 52))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(stream.getvalue())


if __name__ == "__main__":
    build_example(Path(sys.argv[1]))
