"""The winner's model card: Markdown with the front matter of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import yaml

from raytune_vlm.errors import DataError
from raytune_vlm.records import BASE_TRIAL, SweepFolder
from raytune_vlm.report import formatting
from raytune_vlm.report.headline import clearly, headline, interval
from raytune_vlm.report.loading import SweepView, TrialView, load_view, lookup


def model_card(folder: SweepFolder) -> str:
    """The text of `best/README.md`, from the same records as the report page.

    Raises
    ------
    DataError
        If the folder is not a sweep folder, or its sweep has no winner yet.
    """
    view = load_view(folder.root)
    winner = view.winner
    if view.result is None or winner is None:
        raise DataError(f"{folder.root} has no winner yet: no result.json that names one")
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(view), sort_keys=False, allow_unicode=True)}---",
        f"# {_text(view.name)}",
        f"A LoRA adapter for `{_code(view.model)}`: the winner (`{_code(winner.trial_id)}`, step "
        f"{view.result.winner_step:,}) among {len(view.trials)} recipes that raytune_vlm tried.",
        _verdict(view),
        "## Scores on untouched data",
        _scores(view),
        "## Recipe",
        _recipe(view, winner),
        "## How to load it",
        _loading(view),
        "## Limits",
        _limits(view),
        "## Reproduce",
        f"```\n{view.command}\n```",
        f"Fingerprint `{_code(view.fingerprint)}`. The resolved experiment is `experiment.yaml`.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(view: SweepView) -> dict[str, Any]:
    matter: dict[str, Any] = {
        "base_model": view.model,
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "peft", "vision-language", "ray-tune", "raytune_vlm"],
    }
    scores = view.report_scores("winner")
    if scores is not None:
        metrics = [
            {
                "type": name.split("@")[0],
                "name": f"{name} ({formatting.percent(view.confidence)} interval "
                f"{interval(estimate.lower, estimate.upper)})",
                "value": round(estimate.value, 6),
            }
            for name, estimate in scores.metrics.items()
        ]
        dataset = {"name": f"{view.name}, report split", "type": view.name}
        result = {"task": {"type": "image-text-to-text"}, "dataset": dataset, "metrics": metrics}
        matter["model-index"] = [{"name": view.name, "results": [result]}]
    return matter


def _verdict(view: SweepView) -> str:
    test, top = view.against(BASE_TRIAL), headline(view)
    strong = test is None or clearly(test, view.mode) != "good"
    verdict = f"**{top.verdict}**" if strong else top.verdict
    return f"{verdict} {top.detail}"


def _scores(view: SweepView) -> str:
    lines = ["| | " + " | ".join(f"`{_code(m)}`" for m in view.metrics) + " | n |"]
    lines.append("|---|" + "---:|" * (len(view.metrics) + 1))
    for role in ("base", "default", "winner"):
        scores = view.report_scores(role)
        if scores is None:
            continue
        cells = []
        for metric in view.metrics:
            estimate = scores.metrics.get(metric)
            cells.append(
                f"{formatting.score(estimate.value)} ({interval(estimate.lower, estimate.upper)})"
                if estimate
                else formatting.MISSING
            )
        lines.append(f"| {role} | " + " | ".join(cells) + f" | {scores.num_samples} |")
    lines += ["", f"In parentheses: {formatting.percent(view.confidence)} intervals."]
    return "\n".join(lines)


def _recipe(view: SweepView, winner: TrialView) -> str:
    rows = [
        f"| `{_code(key)}` | `{_code(str(value))}` |" for key, value in winner.record.recipe.items()
    ]
    parameters = formatting.count(winner.record.trainable_parameters)
    table = "\n".join(["| key | value |", "|---|---|", *rows])
    scopes = [
        f"{_code(scope)} {formatting.count(count)} {_how(view, winner, scope)}"
        for scope, count in winner.record.trainable_by_scope.items()
    ]
    return f"{table}\n\n{parameters} trainable parameters: {', '.join(scopes)}."


def _how(view: SweepView, winner: TrialView, scope: str) -> str:
    """How a scope was trained: at which rank, or in full."""
    recipe = winner.record.recipe

    def value(key: str) -> Any:
        return recipe.get(key, lookup(view.experiment, key))

    if scope in (value("lora.modules_to_save") or "").split("+"):
        return "in full"
    return f"at rank {value(f'lora.rank_by_scope.{scope}') or value('lora.rank')}"


def _loading(view: SweepView) -> str:
    lines = ["from peft import PeftModel"]
    name = repr(view.model)
    if view.model == "demo":
        name = "DEMO_BASE"
        lines.append("from raytune_vlm.models.loading import DEMO_BASE  # the package ships it")
    lines.append("from transformers import AutoModelForImageTextToText, AutoProcessor")
    options = [name]
    revision = lookup(view.experiment, "model.revision")
    dtype = lookup(view.experiment, "model.dtype")
    options += [f"revision={revision!r}"] if revision else []
    options += [f"dtype={dtype!r}"] if dtype else []
    lines += [
        "",
        f"base = AutoModelForImageTextToText.from_pretrained({', '.join(options)})",
        'model = PeftModel.from_pretrained(base, "best")  # this folder',
        'processor = AutoProcessor.from_pretrained("best")',
    ]
    code = "\n".join(["```python", *lines, "```"])
    if lookup(view.experiment, "model.quantization", "none") == "none":
        return code
    return (
        f"{code}\n\nIt was trained and scored on a base whose language model was in 4 bits (nf4)."
    )


def _limits(view: SweepView) -> str:
    result = view.result
    assert result is not None
    lines = []
    scores = view.report_scores("winner")
    if scores is not None:
        lines.append(
            f"- Judged on {scores.num_samples} samples in {scores.num_groups} groups of one data "
            "set; data of another kind may give other scores."
        )
    naive = (
        f"- Picked by `{_code(view.metric)}` on `select`: {formatting.score(result.naive)} there"
    )
    if result.corrected:
        reach = interval(result.corrected.lower, result.corrected.upper)
        corrected = formatting.score(result.corrected.value)
        naive += f", {corrected} ({reach}) once the selection bias is removed"
    lines.append(f"{naive}. Quote the scores on untouched data, not these.")
    ties = [name for name in result.indistinguishable if name != result.winner]
    if ties:
        lines.append(
            f"- {len(ties)} other trials cannot be told apart from it on this data; the cheapest "
            f"of all is `{_code(result.indistinguishable[0])}`."
        )
    lines.append(
        f"- The report split was touched {result.num_report_touches} times. One seed per recipe: "
        "the spread between seeds was not measured."
    )
    return "\n".join(lines)


def _code(text: str) -> str:
    """Text that stays inside a code span and a table cell."""
    return text.replace("`", "'").replace("|", "/").replace("\n", " ")


def _text(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>#|" else char for char in text)
