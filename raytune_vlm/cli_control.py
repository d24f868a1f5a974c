"""`raytune-vlm control`: stop, pause, pin, clone and limit while a sweep runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from raytune_vlm.errors import ConfigError
from raytune_vlm.visible import tell

_TRIAL = click.argument("trial_id", metavar="TRIAL")
_VALUES = click.argument("values", nargs=-1, required=True, metavar="KEY=VALUE...")


@click.group()
@click.argument("folder", type=click.Path(path_type=Path))
@click.pass_context
def control(context: click.Context, folder: Path) -> None:
    """Ask the driver of a running sweep for something; it acts within seconds.

    FOLDER is the sweep folder. What was asked and answered stands in its ledger.
    """
    context.obj = folder


@control.command()
@click.argument("trial_id", metavar="[TRIAL]", required=False)
@click.pass_obj
def stop(folder: Path, trial_id: str | None) -> None:
    """Stop a trial at its next step; without one, end the search as if its budget were spent."""
    _ask(folder, "stop", trial_id)


@control.command()
@_TRIAL
@click.pass_obj
def pause(folder: Path, trial_id: str) -> None:
    """Save a trial at its next step and free its executor."""
    _ask(folder, "pause", trial_id)


@control.command()
@_TRIAL
@click.pass_obj
def resume(folder: Path, trial_id: str) -> None:
    """Let a paused trial go on."""
    _ask(folder, "resume", trial_id)


@control.command()
@_TRIAL
@click.pass_obj
def pin(folder: Path, trial_id: str) -> None:
    """Train a trial to the last rung, whatever the scheduler says."""
    _ask(folder, "pin", trial_id)


@control.command()
@_TRIAL
@click.pass_obj
def unpin(folder: Path, trial_id: str) -> None:
    """Leave a trial to the scheduler again."""
    _ask(folder, "unpin", trial_id)


@control.command()
@_TRIAL
@_VALUES
@click.pass_obj
def clone(folder: Path, trial_id: str, values: tuple[str, ...]) -> None:
    """Begin a trial where another one's last rung is, with values of the search space changed."""
    _ask(folder, "clone", trial_id, values)


@control.command()
@_VALUES
@click.pass_obj
def extend(folder: Path, values: tuple[str, ...]) -> None:
    """Add to limits: num_trials=8, max_gpu_hours, max_wall_time_s, max_cost."""
    _ask(folder, "extend", None, values)


@control.command("set-budget")
@_VALUES
@click.pass_obj
def set_budget(folder: Path, values: tuple[str, ...]) -> None:
    """Set limits anew: num_trials=24, max_gpu_hours, max_wall_time_s, max_cost."""
    _ask(folder, "set-budget", None, values)


@control.command()
@click.pass_obj
def drain(folder: Path) -> None:
    """Begin no new trials; the search ends when those that there are have."""
    _ask(folder, "drain")


def _ask(
    folder: Path, command: str, trial_id: str | None = None, values: tuple[str, ...] = ()
) -> None:
    from raytune_vlm.records import SweepFolder
    from raytune_vlm.sweep.asking import ask
    from raytune_vlm.sweep.control import Request

    request = Request(command, trial_id, _parsed(values))
    tell(ask(SweepFolder(folder.resolve()), request))


def _parsed(values: tuple[str, ...]) -> dict[str, Any]:
    from raytune_vlm.config.overrides import parse_override

    found: dict[str, Any] = {}
    for text in values:
        key, value, name = parse_override(text)
        if key in found:
            raise ConfigError(f"{name}: {key} is given twice")
        found[key] = value
    return found
