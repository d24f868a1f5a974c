"""Sweeps as Ray jobs: a thin layer on Ray's `JobSubmissionClient`.

What it adds to `ray job submit`: the time that a stopped sweep needs to save, an id that is the
sweep's name, the sweep folder as metadata, and checks before anything is sent. The cluster is
reached as Ray reaches it, with Ray's own variables for tokens.
"""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.config.secrets import hides_secret, secret_problems
from raytune_vlm.errors import ConfigError, InfrastructureError, did_you_mean
from raytune_vlm.monitor import Say
from raytune_vlm.submission.working_dir import Sent, mib

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

STOP_SIGNAL, STOP_WAIT = "RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"
"""What Ray reads in the environment of a job when it is told to stop it."""

STOP_MARGIN_S = 60
"""What a stopped driver gets beyond `train.grace_s`: to end its executors and write the report."""

FOLDER_KEY = "raytune_vlm_folder"
"""Metadata of a job: its sweep folder."""

POLL_S = 0.5

_SECRET = (
    "looks like a secret, and whoever sees the dashboard sees a job's environment; set it in the "
    "environment in which Ray is started on the nodes (see docs/jobs.md)"
)


@dataclass(frozen=True)
class Submission:
    """A job to be: what runs, where its sweep is kept, and what it is sent."""

    name: str
    folder: str
    command: Sequence[str]
    """Of `raytune-vlm`."""
    env: Mapping[str, str]
    sent: Sent


def read_env(pairs: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` of the command line as a mapping.

    Raises
    ------
    ConfigError
        If one has no `=`, or looks like a secret; the value is not in the message.
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if any(secret_problems({key: value})) or hides_secret(pair):
            raise ConfigError(f"--env {key if equals else '...'}: {_SECRET}")
        if not equals or not key:
            raise ConfigError(f"--env {pair}: must be KEY=VALUE")
        found[key] = value
    return found


def stop_env(grace_s: float) -> dict[str, str]:
    """What a job needs in its environment for a stop that saves."""
    return {STOP_SIGNAL: "SIGTERM", STOP_WAIT: str(math.ceil(grace_s) + STOP_MARGIN_S)}


@contextmanager
def job_client(address: str | None) -> Iterator[Any]:
    """Ray's client of the job server; what goes wrong with the server inside becomes one line.

    Without an address it is that of `ADDRESS_VARIABLES`, else the dashboard's own on this machine.

    Raises
    ------
    ConfigError
        If the address holds a password, or the cluster wants a token or another one.
    InfrastructureError
        If the server cannot be reached, or answers with an error.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address is not None:
        if hides_secret(address):
            raise ConfigError("--address: holds a password; use token authentication instead")
        # Ray prefers its variables to the argument.
        os.environ[ADDRESS_VARIABLES[0]] = address
    named = next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), None)
    if named is None:
        named = DEFAULT_ADDRESS
    try:
        yield JobSubmissionClient(named)
    except AuthenticationError as error:
        what = str(error).partition("\n")[0]
        raise ConfigError(
            f"{named}: {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the "
            "cluster's token (or keep it in ~/.ray/auth_token)"
        ) from None
    except OSError as error:
        raise InfrastructureError(f"no Ray job server answers at {named} ({error})") from None
    except RuntimeError as error:
        if isinstance(error, ConfigError | InfrastructureError):
            raise
        lines = dict.fromkeys(str(error).strip().splitlines())
        first, *rest = lines  # the last line of a traceback of the server says most
        what = " ... ".join([first, *rest[-1:]])
        raise InfrastructureError(f"{named}: {what}") from None


def submit(client: Any, new: Submission, say: Say) -> str:
    """Send the working directory, start the job and return its id: the name, or name-2, ..."""
    sent = new.sent
    say(f"working directory {sent.root}: {len(sent.sizes):,} files, {mib(sent.num_bytes)}")
    taken = {job.submission_id for job in client.list_jobs()}
    job_id = client.submit_job(
        entrypoint=shlex.join(["python", "-m", "raytune_vlm", *new.command]),
        submission_id=_free(new.name, taken),
        runtime_env={
            "working_dir": str(sent.root),
            "excludes": list(sent.excludes),
            "env_vars": dict(new.env),
        },
        metadata={"job_name": new.name, FOLDER_KEY: new.folder},
    )
    say(f"job {job_id}: its sweep folder is {new.folder}")
    return str(job_id)


def _free(name: str, taken: set[str | None]) -> str:
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def find_job(client: Any, target: str) -> Any:
    """The job of an id, or the newest one of a sweep folder.

    Raises
    ------
    ConfigError
        If the cluster knows neither.
    """
    jobs = [job for job in client.list_jobs() if job.submission_id]
    for job in jobs:
        if target in (job.submission_id, job.job_id):
            return job
    folder = str(Path(target).absolute())
    of_folder = [job for job in jobs if (job.metadata or {}).get(FOLDER_KEY) == folder]
    if of_folder:
        return max(of_folder, key=lambda job: job.start_time or 0)
    near = did_you_mean(target, [job.submission_id for job in jobs])
    raise ConfigError(f"{target}: is neither a sweep folder here nor a job of the cluster{near}")


def sweep_folder_of(job: Any) -> str:
    """The sweep folder of a job.

    Raises
    ------
    ConfigError
        If it was not started by `raytune-vlm submit`.
    """
    folder = (job.metadata or {}).get(FOLDER_KEY)
    if folder is None:
        raise ConfigError(
            f"job {job.submission_id} was not started by `raytune-vlm submit`: name its sweep "
            "folder instead"
        )
    return str(folder)


def env_of(job: Any) -> dict[str, str]:
    """The environment that a job was submitted with."""
    return dict((job.runtime_env or {}).get("env_vars") or {})


def status_lines(job: Any) -> list[str]:
    """What the cluster says of a job."""
    ended = "" if job.driver_exit_code is None else f", exit status {job.driver_exit_code}"
    folder = (job.metadata or {}).get(FOLDER_KEY, "not known")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
    return [
        f"job {job.submission_id}: {job.status}{ended}, started {since}",
        f"command: {job.entrypoint}",
        f"sweep folder: {folder}",
    ]


def stop(client: Any, job: Any, say: Say) -> Any:
    """Stop a job, wait until it has ended, and say how its output ends; returns its details.

    Raises
    ------
    ConfigError
        If it has ended already.
    """
    job_id = job.submission_id
    if job.status.is_terminal():
        raise ConfigError(f"job {job_id} has ended already: {job.status}")
    wait = env_of(job).get(STOP_WAIT)
    if wait is None:
        say(
            f"job {job_id} was submitted without {STOP_WAIT}: Ray kills it 3 s after it was asked "
            "to stop, and a resumed sweep repeats the steps since the last checkpoints"
        )
    client.stop_job(job_id)
    say(f"job {job_id}: asked to stop; it has {wait or 3} s to save where it is")
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(POLL_S)
    last = [line for line in client.get_job_logs(job_id).splitlines() if line.strip()]
    say(f"job {job_id}: {job.status}; it said last: {last[-1] if last else 'nothing'}")
    return job


def follow(client: Any, job_id: str, say: Say) -> int:
    """Show a job's output until it ends; returns the exit status of its driver.

    A job that was stopped counts as stopped early (3).
    """

    async def show() -> None:
        async for lines in client.tail_job_logs(job_id):
            for line in lines.splitlines():
                say(line)

    asyncio.run(show())
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(POLL_S)
    if str(job.status) == "STOPPED":
        return 3
    return 0 if str(job.status) == "SUCCEEDED" else int(job.driver_exit_code or 1)
