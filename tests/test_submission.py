"""What a job is sent and refused, and what a sweep folder says; without a cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from made import experiment, run_cli

from raytune_vlm.errors import ConfigError
from raytune_vlm.submission import folder, jobs
from raytune_vlm.submission.working_dir import check_paths, count_sent
from raytune_vlm.sweep.cluster import interruptible
from raytune_vlm.sweep.preparing import located

SECRET = "hf_" + "a1B2" * 8


def write(root: Path, *names: str, size: int = 10) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)


def test_a_job_is_sent_neither_caches_nor_secrets_nor_what_git_ignores(tmp_path):
    kept = ["a.yaml", "part/b.py", "environment.yaml"]
    left = [".git/config", "runs/demo/x", ".mypy_cache/x", ".venv/x", "part/__pycache__/x", ".env"]
    write(tmp_path, *kept, *left, "part/big.bin", "ignored/x")
    (tmp_path / ".gitignore").write_text("ignored/\n")
    sent = count_sent(tmp_path, ["*.bin"])
    assert sorted(sent.sizes) == sorted([*kept, ".gitignore"])


def test_the_size_is_that_of_ray_s_own_package(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    write(tmp_path / "sent", "a.yaml", "part/b.py", size=1000)
    sent = count_sent(tmp_path / "sent", ())
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "sent"), package, include_gitignore=True)
    assert sent.num_bytes == package.stat().st_size


def test_more_than_ray_takes_is_refused_with_the_largest_files(tmp_path):
    write(tmp_path, "a.yaml", "small.bin")
    with (tmp_path / "large.bin").open("wb") as stream:
        stream.truncate(101 * 2**20)  # sparse
    with pytest.raises(ConfigError, match=r"101\.0 MiB, and Ray takes 100\.0 MiB.* large\.bin \(1"):
        count_sent(tmp_path, ())
    assert "large.bin" not in count_sent(tmp_path, ["large.bin"]).sizes


def test_paths_that_a_job_would_not_find_or_lose_are_refused(tmp_path):
    write(tmp_path, "a.yaml", "data/train.jsonl", "other/x")
    sent, file = count_sent(tmp_path, ["other"]), tmp_path / "a.yaml"
    good = {"storage_path": "/shared/runs"}
    sources = {"sources": [{"type": "messages", "path": "train.jsonl"}]}
    in_data = experiment(data={"root": "data", **sources}, **good)
    assert check_paths(in_data, file, sent) == "a.yaml"
    check_paths(experiment(data={"root": "/somewhere", **sources}, **good), file, sent)
    with pytest.raises(ConfigError, match="storage_path runs: is relative"):
        check_paths(experiment(data={"root": "data", **sources}), file, sent)
    with pytest.raises(ConfigError, match=r"data\.root other: nothing of it is sent"):
        check_paths(experiment(data={"root": "other", **sources}, **good), file, sent)
    with pytest.raises(ConfigError, match=r"EXPERIMENT \.\./b\.yaml: nothing of it is sent"):
        check_paths(in_data, tmp_path.parent / "b.yaml", sent)


def test_a_job_s_own_driver_refuses_to_lose_its_results(monkeypatch):
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with pytest.raises(ConfigError, match="is deleted after it"):
        located(experiment())
    assert located(experiment(storage_path="/shared")).storage_path == "/shared"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    located(experiment())


def test_secrets_are_refused_by_key_and_never_printed(write_experiment):
    assert jobs.read_env(["A=b=c", "TOKENIZERS_PARALLELISM=false"])["A"] == "b=c"
    for pair, key in (("HF_TOKEN=swordfish", "HF_TOKEN"), (f"A={SECRET}", "A"), (SECRET, "...")):
        with pytest.raises(ConfigError, match=f"--env {key}: looks like a secret") as refused:
            jobs.read_env([pair])
        assert SECRET not in str(refused.value) and "swordfish" not in str(refused.value)
    done = run_cli("submit", write_experiment()[0], f"model.name={SECRET}", check=False)
    assert done.returncode == 2 and "override model.name: " in done.stderr
    assert SECRET not in done.stderr
    with pytest.raises(ConfigError, match="must be KEY=VALUE"):
        jobs.read_env(["A"])
    server = jobs.job_client("http://me:swordfish@127.0.0.1:1")
    with pytest.raises(ConfigError, match="holds a password") as refused, server:
        pass
    assert "swordfish" not in str(refused.value)


def test_a_stopped_job_gets_the_grace_of_the_experiment():
    assert jobs.stop_env(60.5) == {
        "RAY_JOB_STOP_SIGNAL": "SIGTERM",
        "RAY_JOB_STOP_WAIT_TIME_S": "121",
    }


def test_options_without_effect_and_absent_servers_are_named(tmp_path):
    done = run_cli("resume", tmp_path, "--exclude", "x", check=False)
    assert done.returncode == 2 and "--exclude has no effect without --address" in done.stderr
    done = run_cli("status", tmp_path / "none", "--address", "http://127.0.0.1:1", check=False)
    assert done.returncode == 1 and "no Ray job server answers at http://127.0.0.1:1" in done.stderr


@pytest.fixture
def sweep_folder(tmp_path):
    """A sweep folder with two trials, one of them ended; `lease` makes it driven."""
    head = {"experiment": {"sweep": {"num_trials": 4}, "train": {"grace_s": 5}}}
    (tmp_path / "experiment.json").write_text(json.dumps(head))
    rows = [
        {"event": "proposed", "trial_id": "t0000", "recipe": {"lora.rank": 4}},
        {"event": "proposed", "trial_id": "t0001", "recipe": {"lora.rank": 8}},
        {"event": "scored", "trial_id": "t0000", "step": 8, "scores": {"cer@micro": 0.25}},
        {"event": "finished", "trial_id": "t0000", "step": 8},
    ]
    lines = [json.dumps({"seq": n, "time": 0.0, **row}) for n, row in enumerate(rows, start=1)]
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def lease(root, pid, *, host=None, renewed=None):
    held = {"pid": pid, "host": host or socket.gethostname(), "fence": 1}
    held["renewed"] = time.time() if renewed is None else renewed
    (root / "lease.json").write_text(json.dumps(held))


def test_a_sweep_folder_says_how_far_it_is(sweep_folder):
    first, second = folder.status_lines(sweep_folder)
    assert "nothing drives it; `raytune-vlm resume" in first
    assert second == "trials: 1 of 4 ended (1 finished), 1 not yet"
    lease(sweep_folder, 12, host="elsewhere")
    assert "driven by process 12 on elsewhere" in folder.status_lines(sweep_folder)[0]
    told = run_cli("logs", sweep_folder).stdout.splitlines()
    assert told[2].endswith("t0000 scored step 8 scores cer@micro=0.25")


def test_only_a_living_driver_of_this_machine_is_stopped(sweep_folder):
    with pytest.raises(ConfigError, match="nothing drives it"):
        folder.stop(sweep_folder, print)
    lease(sweep_folder, 12, host="elsewhere")
    with pytest.raises(ConfigError, match="not on this machine"):
        folder.stop(sweep_folder, print)
    lease(sweep_folder, 1, renewed=0)
    with pytest.raises(ConfigError, match="gave no sign of life"):
        folder.stop(sweep_folder, print)


def test_a_driver_that_a_script_started_in_the_background_is_stopped_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `&` leaves it
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_driver_is_asked_and_waited_for(sweep_folder):
    child = os.fork()
    if child == 0:
        lease(sweep_folder, os.getpid())

        def leave(*_):
            (sweep_folder / "lease.json").unlink()
            os._exit(3)

        signal.signal(signal.SIGTERM, leave)
        time.sleep(60)
        os._exit(1)
    while not (sweep_folder / "lease.json").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    said = []
    folder.stop(sweep_folder, said.append)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert "asked to stop" in said[0] and "nothing drives it" in said[1]
