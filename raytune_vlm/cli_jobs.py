"""`raytune-vlm submit|status|logs|stop`: sweeps as jobs of a Ray cluster, and sweep folders.

A TARGET of `status`, `logs` and `stop` is a sweep folder on this machine or, with --address, a job
of a cluster: its id or its sweep folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raytune_vlm.cli_data import TRUST
from raytune_vlm.errors import ConfigError
from raytune_vlm.visible import tell

if TYPE_CHECKING:
    from raytune_vlm.submission.jobs import Submission

_Command = TypeVar("_Command", bound=Callable[..., Any])

ADDRESS = click.option(
    "--address", metavar="URL", help="Of the cluster's dashboard: http://127.0.0.1:8265."
)
_TARGET = click.argument("target")


def sent(command: _Command) -> _Command:
    """What says which files a job is sent, its environment, and to which clusters it may go."""
    for decorate in (
        click.option(
            "--open-cluster", is_flag=True, help="Even to a cluster on a network without tokens."
        ),
        click.option("--env", multiple=True, metavar="KEY=VALUE", help="Environment of the job."),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Files not to send."),
        click.option("--working-dir", type=click.Path(path_type=Path), help="[default: .]"),
    ):
        command = decorate(command)
    return command


@click.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@TRUST
@ADDRESS
@sent
@click.option("--follow", is_flag=True, help="Show its output, and end with its exit status.")
def submit(
    experiment: Path,
    overrides: tuple[str, ...],
    trust: str | None,
    address: str | None,
    working_dir: Path | None,
    exclude: tuple[str, ...],
    env: tuple[str, ...],
    open_cluster: bool,
    follow: bool,
) -> None:
    """Run a sweep as a job of a Ray cluster; stopped, it saves and can be resumed."""
    from raytune_vlm.config.loader import load_experiment
    from raytune_vlm.submission.jobs import Submission, read_env, stop_env
    from raytune_vlm.submission.working_dir import check_paths, count_sent

    resolved = load_experiment(experiment, overrides)
    added = read_env(env)
    files = count_sent(working_dir or Path(), exclude)
    there = check_paths(resolved, experiment, files)
    new = Submission(
        name=resolved.name,
        folder=os.path.normpath(Path(resolved.storage_path) / resolved.name),
        command=["sweep", there, *overrides, *_trusted(trust)],
        env={**stop_env(resolved.train.grace_s), **added},
        sent=files,
    )
    start_job(address, new, open_cluster=open_cluster, follow=follow)


def start_job(
    address: str | None, new: Submission, *, open_cluster: bool, follow: bool = False
) -> None:
    """Submit a job and say what can be done with it.

    Raises
    ------
    ConfigError
        If the dashboard is on a network and asks for no token, without `open_cluster`.
    """
    from raytune_vlm.doctor import open_to_all
    from raytune_vlm.submission import jobs

    with jobs.job_client(address) as client:
        why = None if open_cluster else open_to_all(client.get_address())
        if why is not None:
            raise ConfigError(
                f"{why}; start Ray with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1 "
                "(docs/jobs.md), or send it all the same with --open-cluster"
            )
        job_id = jobs.submit(client, new, tell)
        where = "" if address is None else f" --address {address}"
        for verb in ("status", "logs", "stop"):
            tell(f"  raytune-vlm {verb} {job_id}{where}")
        if follow:
            sys.exit(jobs.follow(client, job_id, click.echo))


def resume_job(
    target: str,
    trust: str | None,
    address: str,
    working_dir: Path | None,
    exclude: tuple[str, ...],
    env: tuple[str, ...],
    open_cluster: bool,
) -> None:
    """Submit a job that goes on with the sweep of a folder, or of an earlier job."""
    from raytune_vlm.submission import folder, jobs
    from raytune_vlm.submission.working_dir import count_sent

    added = jobs.read_env(env)
    if folder.is_sweep_folder(target):
        root, kept = str(Path(target).absolute()), jobs.stop_env(folder.grace_s(Path(target)))
    else:
        with jobs.job_client(address) as client:
            before = jobs.find_job(client, target)
        root, kept = jobs.sweep_folder_of(before), jobs.env_of(before)
    new = jobs.Submission(
        name=Path(root).name,
        folder=root,
        command=["resume", root, *_trusted(trust)],
        env={**kept, **added},
        sent=count_sent(working_dir or Path(), exclude),
    )
    start_job(address, new, open_cluster=open_cluster)


def _trusted(trust: str | None) -> list[str]:
    return [] if trust is None else ["--trust-remote-code", trust]


@click.command()
@_TARGET
@ADDRESS
def status(target: str, address: str | None) -> None:
    """Say how far a sweep is: a sweep folder, or a job of a cluster."""
    from raytune_vlm.submission import folder, jobs

    lines = []
    if address is None and folder.is_sweep_folder(target):
        lines = folder.status_lines(Path(target))
    else:
        with jobs.job_client(address) as client:
            job = jobs.find_job(client, target)
        lines = jobs.status_lines(job)
        root = (job.metadata or {}).get(jobs.FOLDER_KEY)
        if root is not None and folder.is_sweep_folder(root):
            lines += folder.status_lines(Path(root))
    for line in lines:
        tell(line)


@click.command()
@_TARGET
@ADDRESS
@click.option("--follow", is_flag=True, help="Go on until the job ends.")
def logs(target: str, address: str | None, follow: bool) -> None:
    """Show the output of a job, or what happened in a sweep folder."""
    from raytune_vlm.submission import folder, jobs

    if address is None and folder.is_sweep_folder(target):
        if follow:
            raise ConfigError(f"--follow is for jobs: `tail -f {target}/ledger.jsonl`")
        for line in folder.log_lines(Path(target)):
            tell(line)
        return
    with jobs.job_client(address) as client:
        job_id = jobs.find_job(client, target).submission_id
        if follow:
            sys.exit(jobs.follow(client, job_id, click.echo))
        click.echo(client.get_job_logs(job_id), nl=False)


@click.command()
@_TARGET
@ADDRESS
def stop(target: str, address: str | None) -> None:
    """Stop a sweep so that it saves where it is; `resume` goes on."""
    from raytune_vlm.submission import folder, jobs

    if address is None and folder.is_sweep_folder(target):
        folder.stop(Path(target), tell)
        return
    with jobs.job_client(address) as client:
        job = jobs.stop(client, jobs.find_job(client, target), tell)
    root = (job.metadata or {}).get(jobs.FOLDER_KEY)
    if root is not None and folder.is_sweep_folder(root):
        for line in folder.status_lines(Path(root)):
            tell(line)
