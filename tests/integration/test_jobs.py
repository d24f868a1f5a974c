"""A sweep as a job of a real Ray cluster with token authentication: stopped, resumed, reported."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from made import cli_environment, run_cli

from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.train import checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@contextmanager
def head_node(monkeypatch):
    """A head node with its dashboard, on ports of its own, that asks for a token; the address of
    its job server."""
    temporary = tempfile.mkdtemp(prefix="rv-", dir="/tmp")  # sockets need a short path
    token = Path(temporary) / "token"
    token.write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    # The package may be installed from elsewhere, and jobs are not sent it.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    port, dashboard, client, agent = free_ports(4)
    gcs = Path(temporary) / "gcs"  # on a disk, as in deploy/cluster.yaml
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(gcs)}
    head = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", f"--port={port}",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", "--include-dashboard=true", "--num-cpus=2",
            f"--temp-dir={temporary}", "--disable-usage-stats",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**cli_environment(), **storage},
    )  # fmt: skip
    ours = psutil.Process(head.pid)
    try:
        wait_until(lambda: answers(dashboard) and answers(agent), head, "no dashboard, no agent")
        yield f"http://127.0.0.1:{dashboard}"
        assert list(gcs.glob("**/*.log"))
    finally:
        started = ours.children(recursive=True) if head.poll() is None else []
        for process in [*started, head]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(60)
        psutil.wait_procs(started, timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, process, message):
    end = time.monotonic() + 240
    while not condition():
        assert process is None or process.poll() is None, message
        assert time.monotonic() < end, message
        time.sleep(0.1)


def num_scored(folder):
    return sum(row["event"] == "scored" for row in read_json_lines(folder / "ledger.jsonl"))


def test_a_submitted_sweep_is_stopped_and_resumed_to_its_winner(write_experiment, monkeypatch):
    with head_node(monkeypatch) as cluster:
        check_that_status_2_is_the_job_s(cluster, write_experiment)
        check_stop_and_resume(cluster, write_experiment)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        refused = run_cli("status", "from-a-job", "--address", cluster, check=False)
        assert refused.returncode == 2 and "RAY_AUTH_MODE=token" in refused.stderr


def check_stop_and_resume(cluster, write_experiment):
    file, folder = write_experiment("from-a-job")
    work = file.parent
    address = ("--address", cluster)
    # Long enough that it still searches when it is stopped.
    longer = ("train.max_steps=30", "sweep.num_replicates=0")
    said = run_cli("submit", file, *longer, *address, "--working-dir", work).stdout
    assert f"job from-a-job: its sweep folder is {folder}" in said

    assert re.search("from-a-job: (PENDING|RUNNING)", run_cli("status", folder, *address).stdout)

    wait_until(lambda: num_scored(folder) >= 1, None, "the job scores nothing")
    said = run_cli("stop", folder, *address).stdout
    assert "job from-a-job: STOPPED" in said and "trials ended; `raytune-vlm resume" in said
    assert "nothing drives it" in said and not (folder / "result.json").exists()
    assert (folder / "report" / "index.html").exists()
    before = read_json_lines(folder / "ledger.jsonl")
    ended = {row["trial_id"] for row in before if row["event"] in ("finished", "stopped")}
    for trial_id in set(SweepFolder(folder).trial_ids()) - ended:
        trial = SweepFolder(folder).trial(trial_id)
        saved = max(checkpoint.steps(trial.checkpoints), default=0)
        assert saved == trial.record().step, "a step was lost"

    said = run_cli("resume", "from-a-job", *address, "--working-dir", work).stdout
    assert "job from-a-job-2" in said
    said = run_cli("logs", "from-a-job-2", *address, "--follow").stdout
    assert "Leaderboard of from-a-job" in said
    assert "SUCCEEDED, exit status 0" in run_cli("status", folder, *address).stdout
    assert "ended; winner t00" in run_cli("status", folder).stdout
    after = read_json_lines(folder / "ledger.jsonl")
    assert after[: len(before)] == before and (folder / "best" / "README.md").exists()

    done = run_cli("status", "from-a-jbo", *address, check=False)
    assert done.returncode == 2 and "did you mean 'from-a-job'" in done.stderr


def check_that_status_2_is_the_job_s(cluster, write_experiment):
    """Also by Ray's own command; a storage folder that Ray deletes is refused there."""
    file, _ = write_experiment("refused")
    arguments = (file, "model.name=dmeo", "--address", cluster, "--working-dir", file.parent)
    done = run_cli("submit", *arguments, "--follow", check=False)
    assert done.returncode == 2 and "did you mean 'demo'" in done.stdout

    submit = ["ray", "job", "submit", "--address", cluster, "--working-dir", file.parent, "--"]
    ours = ["python", "-m", "raytune_vlm", "sweep", file.name, "storage_path=runs"]
    done = subprocess.run([*submit, *ours], capture_output=True, text=True, env=cli_environment())
    assert "storage_path runs: is relative" in done.stdout and "exit code 2" in done.stdout
