"""`raytune-vlm evaluate TARGET`: a split of a sweep folder, or any model on benchmarks.

raytune-vlm evaluate TARGET --benchmarks docvqa,chartqa@human [dotted.key=value ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raytune_vlm.cli_data import TRUST
from raytune_vlm.errors import ConfigError, did_you_mean
from raytune_vlm.visible import tell

if TYPE_CHECKING:
    from raytune_vlm.config import ExperimentConfig
    from raytune_vlm.config.server import ServedModel
    from raytune_vlm.evaluate.benchmarks.card import Card

KEYS = (
    "storage_path",
    "seed",
    "model.revision",
    "model.dtype",
    "model.quantization",
    "model.attention",
    "model.image_backend",
    "data.tier",
    "data.disk_budget_gb",
    "data.decode_threads",
    "train.backend",
    "train.num_workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "evaluation.batch_size",
    "evaluation.confidence",
    "evaluation.num_bootstrap",
    "sweep.num_executors",
    "sweep.max_failures",
)
"""What can be overridden with `--benchmarks`: any other key has no effect there."""
SERVED_KEYS = (
    "storage_path",
    "seed",
    "model.revision",
    "evaluation.confidence",
    "evaluation.num_bootstrap",
)
"""The same where a server answers."""

SERVER_OPTIONS = {
    "served_model": "model",
    "server_key_env": "api_key_env",
    "server_host": "allowed_host",
    "server_parallel": "parallel",
    "server_timeout": "timeout_s",
}
"""Option -> key of `config.server.ServedModel`."""


@click.command()
@click.argument("target")
@click.argument("overrides", nargs=-1)
@TRUST
@click.option(
    "--trial",
    "trials",
    metavar="IDS",
    help="Trial ids, `best` or `base`; several as t0003,base share batches.  [default: base]",
)
@click.option("--split", type=click.Choice(["select", "report"]), help="[default: select]")
@click.option(
    "--benchmarks", metavar="NAMES", help="docvqa,chartqa@human,mine.yaml: see docs/benchmarks.md."
)
@click.option("--adapter", type=click.Path(path_type=Path), help="A PEFT adapter on the model.")
@click.option("--data", metavar="DIR|fixtures", help="DIR/<benchmark>/ instead of the hub.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of a model's scores.")
@click.option("--robustness", is_flag=True, help="With altered images too (--split report).")
@click.option("--limit", type=click.IntRange(min=1), help="So many questions, always the same.")
@click.option("--server", metavar="URL", help="Who answers: a server of OpenAI's API (vLLM, ...).")
@click.option("--served-model", metavar="NAME", help="The model, as the server names it.")
@click.option("--server-key-env", metavar="VARIABLE", help="Variable that holds the server's key.")
@click.option("--server-host", metavar="HOST", help="Machine that images may be sent to.")
@click.option("--server-parallel", type=int, help="Questions at once.  [default: 8]")
@click.option("--server-timeout", type=float, help="Seconds for one answer.  [default: 300]")
def evaluate(
    target: str,
    overrides: tuple[str, ...],
    trust: str | None,
    trials: str | None,
    split: str | None,
    benchmarks: str | None,
    adapter: Path | None,
    data: str | None,
    output: Path | None,
    robustness: bool,
    limit: int | None,
    server: str | None,
    **server_options: Any,
) -> None:
    """Score a trial of a sweep folder on a split, or any model on benchmarks.

    TARGET is a sweep folder; with --benchmarks also a model: a folder, a hub name, tiny:FAMILY.
    With --server another model answers, and TARGET's processor only prepares the questions.
    """
    served = _served(server, server_options)
    if served is not None:
        ours = {"--trial": trials, "--adapter": adapter, "--robustness": robustness or None}
        for name, value in ours.items():
            if value is not None:
                raise ConfigError(f"{name} has no effect with --server: {served.model} answers")
    only = {"--adapter": adapter, "--data": data, "--output": output, "--limit": limit}
    if benchmarks is None:
        named = [name for name, value in only.items() if value is not None] + list(overrides)
        if named:
            raise ConfigError(f"{named[0]} has no effect without --benchmarks")
        named_trials = _named_trials(trials)
        _split(
            Path(target), trust, named_trials, split or "select", curve=robustness, served=served
        )
        return
    if robustness:
        raise ConfigError("--robustness has no effect with --benchmarks")
    if split is not None:
        raise ConfigError(f"--split {split} and --benchmarks exclude each other")
    _check_keys(overrides, KEYS if served is None else SERVED_KEYS)
    shared = {"data": data, "limit": limit, "server": served}
    cards = _benchmarks(target, overrides, benchmarks, trust, trials, adapter, output, shared)
    tell("\n\n".join(card.text() for card in cards))


def _benchmarks(
    target: str,
    overrides: tuple[str, ...],
    names: str,
    trust: str | None,
    trials: str | None,
    adapter: Path | None,
    output: Path | None,
    shared: dict[str, Any],
) -> list[Card]:
    from raytune_vlm.evaluate.benchmarks import find_benchmarks

    chosen = find_benchmarks(names)
    is_sweep = (Path(target) / "experiment.json").exists()
    wrong = {"--adapter": adapter, "--output": output} if is_sweep else {"--trial": trials}
    for name, value in wrong.items():
        if value is not None:
            kind = "a sweep folder" if is_sweep else "a model, not a sweep folder"
            raise ConfigError(f"{name} {value} has no effect: {target} is {kind}")
    from raytune_vlm.monitor import Monitor

    with Monitor() as monitor:
        from raytune_vlm.sweep.evaluate_suite import evaluate_model, evaluate_trials

        if is_sweep:
            return evaluate_trials(
                Path(target),
                _named_trials(trials),
                chosen,
                overrides=lambda recorded: _overridden(recorded.model_dump(), overrides).trusting(
                    recorded.model.trusted_revision
                ),
                trust=trust,
                monitor=monitor,
                **shared,
            )
        from raytune_vlm.models.trust import with_trust

        experiment = with_trust(_overridden(_plain(target), overrides), trust)
        return [
            evaluate_model(
                experiment, chosen, adapter=adapter, output=output, monitor=monitor, **shared
            )
        ]


def _named_trials(names: str | None) -> list[str]:
    """The parts of `--trial`; the base model where it is not given."""
    return [name.strip() for name in (names or "base").split(",")]


def _served(server: str | None, options: dict[str, Any]) -> ServedModel | None:
    """The served model that the options name; raises ConfigError, one line a problem."""
    from pydantic import ValidationError

    from raytune_vlm.config.server import ServedModel

    given = {name: value for name, value in options.items() if value is not None}
    if server is None:
        for name in given:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --server")
        return None
    if "served_model" not in given:
        raise ConfigError("--server needs --served-model: a model, as the server names it")
    fields = {SERVER_OPTIONS[name]: value for name, value in given.items()}
    try:
        return ServedModel(base_url=server, **fields)
    except ValidationError as error:
        names = {"base_url": "server", **{field: name for name, field in SERVER_OPTIONS.items()}}
        lines = []
        for problem in error.errors():
            why = problem["msg"].removeprefix("Value error, ")
            what = "--server"
            if problem["loc"]:
                option = names[str(problem["loc"][0])].replace("_", "-")
                what = f"--{option} {problem['input']!r}"
            lines.append(f"{what}: {why}")
        raise ConfigError(*lines) from None


def _split(
    folder: Path,
    trust: str | None,
    trial_ids: list[str],
    split: str,
    *,
    curve: bool,
    served: ServedModel | None,
) -> None:
    from raytune_vlm.config.evaluation import USUAL_CURVE
    from raytune_vlm.monitor import Monitor

    with Monitor() as monitor:
        if served is not None:
            from raytune_vlm.sweep.evaluate_served import score_served_split

            scored = score_served_split(folder, split, served, monitor=monitor, trust=trust)
            found = {served.model: scored}
        else:
            from raytune_vlm.sweep.single import evaluate_split

            found = evaluate_split(
                folder,
                trial_ids,
                split,
                monitor=monitor,
                trust=trust,
                robustness=USUAL_CURVE if curve else None,
            )
    for trial_id, scores in found.items():
        who = f"{trial_id} step {scores.step}: " if len(found) > 1 else ""
        for name, entry in scores.metrics.items():
            tell(f"{who}{name} {entry.value:.4f} [{entry.lower:.4f}, {entry.upper:.4f}]")
            if scores.clean is not None and name in scores.clean.metrics:
                clean, number = scores.clean.metrics[name], scores.clean.num_samples
                tell(
                    f"{who}{name} {clean.value:.4f} [{clean.lower:.4f}, {clean.upper:.4f}] on the "
                    f"{number} samples that overlap no training sample"
                )
    if split == "report":
        from raytune_vlm.records import SweepFolder

        touches = len(SweepFolder(folder).report_touches())
        tell(f"report was touched {touches} times in the life of this folder")


def _check_keys(overrides: tuple[str, ...], known: tuple[str, ...]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key not in known:
            near, where = did_you_mean(key, known), "benchmarks"
            if key in KEYS:
                near, where = "", "a server's answers"
            raise ConfigError(f"override {override}: {key} has no effect on {where}{near}")


def _plain(model: str) -> dict[str, Any]:
    """An experiment of nothing but a model; its data is replaced by the benchmarks."""
    return {
        "name": "benchmarks",
        "model": {"name": model},
        "data": {"sources": [{"type": "messages", "path": "benchmarks"}]},
    }


def _overridden(plain: dict[str, Any], overrides: tuple[str, ...]) -> ExperimentConfig:
    """The experiment with the overrides; raises ConfigError, one line a problem."""
    from raytune_vlm.config.loader import resolve

    return resolve(plain, overrides)
