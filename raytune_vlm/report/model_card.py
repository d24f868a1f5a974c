"""Model cards: Markdown with the front matter of the Hugging Face hub."""

from __future__ import annotations

import re
from typing import Any

import yaml

from raytune_vlm.errors import DataError
from raytune_vlm.records import BASE_TRIAL, SweepFolder
from raytune_vlm.report import formatting
from raytune_vlm.report.headline import clearly, headline, interval
from raytune_vlm.report.lineage import lineage, schedule
from raytune_vlm.report.loading import SweepView, TrialView, load_view, lookup


def model_card(
    folder: SweepFolder,
    trial_id: str | None = None,
    step: int | None = None,
    *,
    place: str = "best",
    merged: bool = False,
) -> str:
    """The text of a `README.md`, from the same records as the report page.

    Of the winner at its step all is told; a card of any other checkpoint says that it is not the
    winner and has only the scores that the search saw.

    Parameters
    ----------
    trial_id, step
        The checkpoint; the winner's by default.
    place
        The name of the folder that the card lies in.
    merged
        Whether the folder holds a whole model instead of an adapter.

    Raises
    ------
    DataError
        If the folder is not a sweep folder, has no such trial, or its sweep has no winner yet and
        none was named.
    """
    view = load_view(folder.root)
    result = view.result
    if trial_id is None:
        if result is None or view.winner is None:
            raise DataError(f"{folder.root} has no winner yet: no result.json that names one")
        trial_id, step = result.winner, result.winner_step
    is_winner = result is not None and (trial_id, step) == (result.winner, result.winner_step)
    trial = TrialView(trial_id, folder.trial(trial_id).record())
    middle = _of_the_winner(view, trial) if is_winner else _of_another(view, folder, trial, step)
    matter = _front_matter(view, is_winner=is_winner, merged=merged)
    base, which = f"`{_code(view.model)}`", f"`{_code(trial_id)}`, step {step or 0:,}"
    kind = f"{base} with a LoRA adapter in its weights" if merged else f"A LoRA adapter for {base}"
    standing = (
        f"the winner ({which}) among {len(view.trials)} recipes that raytune_vlm tried."
        if is_winner
        else f"one recipe ({which}) of {len(view.trials)} that raytune_vlm tried, not the winner."
    )
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(view.name)}",
        f"{kind}: {standing}",
        *middle,
        *([_MERGED] if merged else []),
        "## How to load it",
        _loading(view, place, merged),
        "## Reproduce",
        f"```\n{view.command}\n```",
        f"Fingerprint `{_code(view.fingerprint)}`. The resolved experiment is `experiment.yaml`.",
    ]
    return "\n\n".join(parts) + "\n"


_MERGED = (
    "- The scores are those of the adapter beside the base model; merging rounds the sum of both "
    "to the base's number format."
)


def _of_the_winner(view: SweepView, trial: TrialView) -> list[str]:
    """Verdict, scores, recipe and limits of the winner at its step."""
    return [
        _verdict(view),
        "## Scores on untouched data",
        _scores(view),
        "## Recipe",
        _recipe(view, trial),
        "## Limits",
        _limits(view),
    ]


def _of_another(
    view: SweepView, folder: SweepFolder, trial: TrialView, step: int | None
) -> list[str]:
    """The same of any other checkpoint, for which there is less to say."""
    found = [s for s in folder.trial(trial.trial_id).scores("select") if s.step == step]
    rows = [
        f"| `{_code(name)}` | {formatting.score(estimate.value)} "
        f"({interval(estimate.lower, estimate.upper)}) |"
        for scores in found
        for name, estimate in scores.metrics.items()
    ]
    table = ["| metric | value |", "|---|---:|", *rows]
    limits = ["- It was not scored on data that the search did not see: expect less than this."]
    if view.result is not None:
        limits.append(
            f"- The winner of the sweep is `{_code(view.result.winner)}` at step "
            f"{view.result.winner_step:,}."
        )
    else:
        limits.append("- The sweep has not decided on a winner.")
    return [
        "## Scores on `select`, which the search saw",
        "\n".join(table) if rows else "This checkpoint was not scored.",
        "## Recipe",
        _recipe(view, trial),
        "## Limits",
        "\n".join(limits),
    ]


def _front_matter(view: SweepView, *, is_winner: bool, merged: bool) -> dict[str, Any]:
    matter: dict[str, Any] = {}
    # The hub takes names of models there, not `demo` and not a folder of somebody's machine.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", view.model):
        matter["base_model"] = view.model
        matter["base_model_relation"] = "finetune" if merged else "adapter"
    matter |= {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", *([] if merged else ["peft"]), "vision-language", "raytune_vlm"],
    }
    scores = view.report_scores("winner")
    if is_winner and scores is not None:
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
    trained = f"{parameters} trainable parameters: {', '.join(scopes)}."
    return "\n\n".join([table, trained, *_taught(view, winner)])


def _taught(view: SweepView, winner: TrialView) -> list[str]:
    """What the model learned from beside the labels; whoever passes it on has to know."""
    own = lookup(view.experiment, "train.distillation", {})
    changed = {
        key.rpartition(".")[2]: value
        for key, value in winner.record.recipe.items()
        if key.startswith("train.distillation.")
    }
    own = {**own, **changed}
    if own.get("teacher") is None or own["weight"] == 0:
        return []
    adapter = f" with the adapter `{_code(own['adapter'])}`" if own["adapter"] else ""
    return [
        f"Its other target, beside the labels, was the distribution of `{_code(own['teacher'])}`"
        f"{adapter}: weight {own['weight']:g}, temperature {own['temperature']:g}."
    ]


def _how(view: SweepView, winner: TrialView, scope: str) -> str:
    """How a scope was trained: at which rank, or in full."""
    recipe = winner.record.recipe

    def value(key: str) -> Any:
        return recipe.get(key, lookup(view.experiment, key))

    if scope in (value("lora.modules_to_save") or "").split("+"):
        return "in full"
    return f"at rank {value(f'lora.rank_by_scope.{scope}') or value('lora.rank')}"


def _loading(view: SweepView, place: str, merged: bool) -> str:
    lines = [] if merged else ["from peft import PeftModel"]
    name = repr(place if merged else view.model)
    if view.model == "demo" and not merged:
        name = "DEMO_BASE"
        lines.append("from raytune_vlm.models.location import DEMO_BASE  # the package ships it")
    lines.append("from transformers import AutoModelForImageTextToText, AutoProcessor")
    options = [name]
    revision = None if merged else lookup(view.experiment, "model.revision")
    dtype = lookup(view.experiment, "model.dtype")
    options += [f"revision={revision!r}"] if revision else []
    options += [f"dtype={dtype!r}"] if dtype else []
    loaded = f"AutoModelForImageTextToText.from_pretrained({', '.join(options)})"
    here = "  # this folder"
    lines += ["", f"model = {loaded}{here}"] if merged else ["", f"base = {loaded}"]
    lines += [] if merged else [f"model = PeftModel.from_pretrained(base, {place!r}){here}"]
    lines.append(f"processor = AutoProcessor.from_pretrained({place!r})")
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
    legs = lineage(
        result.winner, view.winner.record.recipe if view.winner else {}, view.clone_origins
    )
    if len(legs) > 1:
        origin, changed = view.clone_origins[result.winner], schedule(legs)
        lines.append(
            f"- It is a clone of `{_code(origin['parent'])}` at step {origin['step']:,}"
            + (f", found by a schedule: `{_code(changed)}`" if changed else "")
            + ". Its recipe alone, trained from the beginning, does not give it."
        )
    others = [formatting.score(r.value) for r in result.replicates if r.value is not None]
    spread = (
        f"The winner's recipe with other seeds: {', '.join(others)} on `select`."
        if others
        else "One seed per recipe: the spread between seeds was not measured."
    )
    own = result.own_seeds()
    if own is not None:
        spread = (
            f"Its recipe was picked by the mean over {len(own.values)} seeds, "
            f"{formatting.score(own.mean)} ± {formatting.score(own.spread)} on `select`; this is "
            "the best of them." + (f" {spread}" if others else "")
        )
    lines.append(f"- The report split was touched {view.num_report_touches} times. {spread}")
    return "\n".join(lines)


def _code(text: str) -> str:
    """Text that stays inside a code span and a table cell."""
    return text.replace("`", "'").replace("|", "/").replace("\n", " ")


def _text(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>#|" else char for char in text)
