"""`raytune-vlm`: thin commands over the stages. Heavy imports stand inside the commands' bodies.

raytune-vlm COMMAND EXPERIMENT.yaml [dotted.key=value ...]
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raytune_vlm import __version__
from raytune_vlm.cli_control import control
from raytune_vlm.cli_data import TRUST, data
from raytune_vlm.cli_evaluate import evaluate
from raytune_vlm.cli_jobs import ADDRESS, logs, resume_job, sent, status, stop, submit
from raytune_vlm.errors import ConfigError, RaytuneVlmError
from raytune_vlm.visible import tell, visible

if TYPE_CHECKING:
    from raytune_vlm.config import ExperimentConfig

_EXPERIMENT = click.argument("experiment", type=click.Path(path_type=Path))
_OVERRIDES = click.argument("overrides", nargs=-1)
_TINY = click.option(
    "--tiny",
    metavar="FAMILY",
    expose_value=False,
    callback=lambda context, _, family: setattr(context, "obj", family),
    help="A tiny random model of this family in place of the experiment's: a dry run.",
)
_FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raytune-vlm")
def cli() -> None:
    """Find the best LoRA recipe for a vision-language model, and prove it with numbers.

    An EXPERIMENT is a YAML file; any of its keys can be overridden: lora.rank=8.
    """


for command in (control, data, evaluate, submit, status, logs, stop):
    cli.add_command(command)


@cli.command()
@_EXPERIMENT
@_OVERRIDES
@TRUST
@_TINY
@click.option("--show", is_flag=True, help="Print the resolved experiment.")
@click.option("--quick", is_flag=True, help="Leave out parameters and memory, which load torch.")
def validate(
    experiment: Path, overrides: tuple[str, ...], trust: str | None, show: bool, quick: bool
) -> None:
    """Check an experiment, its model and its data paths; predict parameters and memory."""
    from raytune_vlm.config.loader import render
    from raytune_vlm.models.location import check_model
    from raytune_vlm.models.teacher import check_teacher
    from raytune_vlm.prepare.sizes import noted_sizes
    from raytune_vlm.records import SweepFolder
    from raytune_vlm.sweep.budget import planner_line
    from raytune_vlm.sweep.detect import detectable_lines, pilot_scores
    from raytune_vlm.train.packages import check_packages, check_searcher, check_trackers

    resolved = _load(experiment, overrides, trust)
    check_packages(resolved.train)
    check_searcher(resolved.sweep)
    check_trackers(resolved.report)
    family = check_model(resolved.model)
    family.check_scopes(resolved.lora_scopes())
    family.check_packing(resolved.train.pack_tokens)
    check_teacher(resolved)
    _check_sources(resolved)
    if resolved.sweep.warm_start:
        from raytune_vlm.sweep.warm_start import check_warm_start  # imports Optuna

        check_warm_start(resolved)
    if show:
        click.echo(render(resolved), nl=False)
    train = resolved.train
    length, scored = f"{train.max_steps} steps", ", ".join(map(str, resolved.rungs))
    if train.epochs is not None:
        length, scored = f"{train.epochs:g} epochs", "that the prepared data tells"
    tell(
        f"{experiment}: valid ({resolved.fingerprint()}): {resolved.model.name} "
        f"({family.model_type}), {resolved.sweep.num_trials} trials of up to "
        f"{length}, {resolved.metric} scored at steps {scored}"
    )
    folder = SweepFolder(Path(resolved.storage_path) / resolved.name)
    for line in detectable_lines(resolved, noted_sizes(resolved), pilot_scores(resolved, folder)):
        tell(f"as last prepared, {line}")
    tell(planner_line(resolved))
    for note in resolved.sweep.notes():
        tell(note)
    if not quick:
        _predict(resolved)


def _predict(experiment: ExperimentConfig) -> None:
    import logging
    import warnings

    import transformers

    from raytune_vlm.sweep.constraints import Predictor, check_constraints
    from raytune_vlm.train.prediction import describe, predict

    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of each other
        tell(describe(predict(experiment), experiment.lora))
        check_constraints(experiment, Predictor(experiment))


def _load(file: Path, overrides: tuple[str, ...], trust: str | None) -> ExperimentConfig:
    from raytune_vlm.config.loader import load_experiment
    from raytune_vlm.models.trust import with_trust

    family = click.get_current_context().obj
    if family is not None:
        overrides = (*overrides, f"model.name=tiny:{family}", "model.revision=null")
    return with_trust(load_experiment(file, overrides), trust)


def _check_sources(experiment: ExperimentConfig) -> None:
    from raytune_vlm.sources import SOURCES
    from raytune_vlm.sources.remote import is_remote

    for source in experiment.data.sources:
        if not is_remote(source.path):
            SOURCES[source.type].list_shards(source, Path(experiment.data.root), False)


@cli.command()
@_OVERRIDES
def demo(overrides: tuple[str, ...]) -> None:
    """Run the embedded sweep: no network, no GPU, a few minutes on two cores."""
    from raytune_vlm.config.loader import load_experiment
    from raytune_vlm.demo.data import write_demo_data
    from raytune_vlm.monitor import Monitor

    experiment = load_experiment(DEMO_EXPERIMENT, overrides)
    experiment = experiment.model_copy(update={"name": _free_name(experiment)})
    with Monitor() as monitor:
        write_demo_data(Path(experiment.data.root))
        monitor.say(f"demo data in {experiment.data.root}")
        _sweep(experiment, monitor)


DEMO_EXPERIMENT = Path(__file__).parent / "demo" / "experiment.yaml"
"""The experiment that `demo` runs; `experiments/demo.yaml` is a link to it."""


def _free_name(experiment: ExperimentConfig) -> str:
    """`demo`, or `demo-2`, `demo-3`, ... where earlier demos left their folders."""
    name, number = experiment.name, 1
    while (Path(experiment.storage_path) / name).exists():
        number += 1
        name = f"{experiment.name}-{number}"
    return name


@cli.command()
@_EXPERIMENT
@_OVERRIDES
@TRUST
@_TINY
def prepare(experiment: Path, overrides: tuple[str, ...], trust: str | None) -> None:
    """Read, check and encode the data once; later runs find it."""
    from raytune_vlm.monitor import Monitor

    resolved = _load(experiment, overrides, trust)
    with Monitor() as monitor:
        from raytune_vlm.sweep.runner import prepare_only

        data = prepare_only(resolved, monitor=monitor)
        for entry in data.quarantine:
            monitor.say(f"quarantined: {entry.origin}: {entry.reason}")


@cli.command()
@_EXPERIMENT
@_OVERRIDES
@TRUST
@_TINY
def train(experiment: Path, overrides: tuple[str, ...], trust: str | None) -> None:
    """Train the experiment's own recipe; run again, it goes on from its newest checkpoint."""
    from raytune_vlm.monitor import Monitor

    resolved = _load(experiment, overrides, trust)
    with Monitor() as monitor:
        from raytune_vlm.sweep.single import train_one

        trial = train_one(resolved, command=_command(), monitor=monitor)
        tell(f"adapter: {trial}")


@cli.command()
@_EXPERIMENT
@_OVERRIDES
@TRUST
@_TINY
def sweep(experiment: Path, overrides: tuple[str, ...], trust: str | None) -> None:
    """Search recipes, pick the winner, prove it, report."""
    from raytune_vlm.monitor import Monitor

    resolved = _load(experiment, overrides, trust)
    with Monitor() as monitor:
        _sweep(resolved, monitor)


def _sweep(experiment: ExperimentConfig, monitor: Any) -> None:
    from raytune_vlm.sweep.conclusion import conclude
    from raytune_vlm.sweep.runner import run_sweep

    conclude(run_sweep(experiment, command=_command(), monitor=monitor), monitor)


@cli.command()
@click.argument("folder")
@TRUST
@click.option("--into", type=click.Path(path_type=Path), help="Where a copy is brought back to.")
@ADDRESS
@sent
def resume(
    folder: str,
    trust: str | None,
    into: Path | None,
    address: str | None,
    working_dir: Path | None,
    exclude: tuple[str, ...],
    env: tuple[str, ...],
    open_cluster: bool,
) -> None:
    """Continue a sweep that was stopped or killed, from its folder or the URL of its copy.

    With --address as a job of that cluster; FOLDER may then be the id of the earlier job.
    """
    from raytune_vlm.monitor import Monitor

    if address is not None:
        if into is not None:
            raise ConfigError(f"--into {into} has no effect with --address")
        resume_job(folder, trust, address, working_dir, exclude, env, open_cluster)
        return
    of_jobs = {
        "--working-dir": working_dir,
        "--exclude": exclude,
        "--env": env,
        "--open-cluster": open_cluster,
    }
    if named := [name for name, value in of_jobs.items() if value]:
        raise ConfigError(f"{named[0]} has no effect without --address")
    is_copy = "://" in folder
    if is_copy != (into is not None):
        where = "a URL needs --into DIR" if is_copy else f"--into {into} has no effect"
        raise ConfigError(f"resume {folder}: {where}")
    with Monitor() as monitor:
        from raytune_vlm.sweep.conclusion import conclude
        from raytune_vlm.sweep.folder_copy import bring_back
        from raytune_vlm.sweep.runner import resume_sweep

        root = Path(folder) if into is None else bring_back(folder, into)
        conclude(resume_sweep(root, monitor=monitor, trust=trust), monitor)


@cli.command()
@_FOLDER
@click.option("--trial", "trial_id", default="best", help="Trial id, or `best`: the winner.")
@click.option("--step", type=int, help="Step of the checkpoint; by default the best scored one.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["adapter", "merged"]),
    default="adapter",
    show_default=True,
    help="A PEFT adapter, or a whole model with the adapter in its weights.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder.")
@TRUST
def export(
    folder: Path, trial_id: str, step: int | None, form: Any, output: Path, trust: str | None
) -> None:
    """Write a trial of a sweep folder as an adapter or a whole model; say if vLLM can serve it."""
    import warnings

    from raytune_vlm.sweep.export import export as write
    from raytune_vlm.sweep.export import serving_lines

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of each other
        written = write(folder, output, trial_id=trial_id, step=step, form=form, trust=trust)
    tell(f"{written.trial_id}, step {written.step}: {form} in {written.folder}")
    for line in serving_lines(written):
        tell(line)


@cli.command()
@_FOLDER
@click.option("--png", is_flag=True, help="Also every plot, and the loss of each trial, as PNG.")
def report(folder: Path, png: bool) -> None:
    """Write the report of a sweep folder again; needs neither Ray nor torch."""
    from raytune_vlm.report.html import build_report

    tell(str(build_report(folder, png=png)))


@cli.command()
@_FOLDER
@click.option("--metrics", help="Variants, by commas; by default those that are stored.")
def rescore(folder: Path, metrics: str | None) -> None:
    """Score every stored answer of a sweep folder again; needs no GPU, no torch and no Ray."""
    from raytune_vlm.sweep.rescoring import rescore_folder

    wanted = tuple(metrics.split(",")) if metrics is not None else None
    for line in rescore_folder(folder, wanted):
        tell(line)


@cli.command()
@click.option("--storage", type=click.Path(path_type=Path), default="runs", show_default=True)
@click.option("--address", metavar="URL", help="Of a cluster's dashboard to look at.")
def doctor(storage: Path, address: str | None) -> None:
    """Look for what is wrong with this machine, and say what to do; status 1 if a sweep fails."""
    from raytune_vlm.doctor import examine

    problems = 0
    for found in examine(storage, address):
        problems += found.level == "problem"
        tell(f"{found.level:8} {found.about}: {found.what}")
        if found.remedy:
            tell(f"{'':8}   -> {found.remedy}")
    sys.exit(1 if problems else 0)


@cli.command()
@click.option("--output", type=click.Path(path_type=Path), help="Write to a file.")
@click.option("--markdown", "is_markdown", is_flag=True, help="As a page for readers.")
def schema(output: Path | None, is_markdown: bool) -> None:
    """Print the JSON schema of experiment files, for editors."""
    from raytune_vlm.config.reference import markdown
    from raytune_vlm.config.schema import schema_text

    text = markdown() if is_markdown else schema_text()
    if output is not None:
        output.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)


def _command() -> str:
    return shlex.join(["raytune-vlm", *sys.argv[1:]])


def main() -> None:
    """Entry point: expected errors are one line and their own exit status."""
    # Read when ray is imported: under `uv run` its workers would otherwise hang.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        cli(standalone_mode=False)
    except RaytuneVlmError as error:
        click.echo(visible(f"error: {error.message}"), err=True)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(3)
    except Exception:
        click.echo(visible(traceback.format_exc()), nl=False, err=True)
        sys.exit(1)
