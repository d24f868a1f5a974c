"""Several drivers on one cluster: they share it, wait for it, and die by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
from clusters import OF_A_CLUSTER, SETTINGS, start_head, train_workers
from made import cli_command, cli_environment

from raytune_vlm.records import SweepFolder, read_json_lines

pytestmark = [pytest.mark.integration, pytest.mark.slow, *OF_A_CLUSTER]

PATIENCE = float(os.environ.get("RAYTUNE_VLM_TEST_PATIENCE", "1"))


@pytest.fixture
def cluster(monkeypatch):
    """A node of two CPUs, which two executors take whole."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    made = start_head(num_cpus=2)
    yield made
    made.shutdown()


class Drivers:
    """`raytune-vlm` on the cluster, with what each process says in a file."""

    def __init__(self, cluster, folder):
        self._environment = {**cli_environment(), "RAY_ADDRESS": cluster.address}
        self._folder = folder
        self.started = []

    def start(self, name, *arguments):
        with self._log(name).open("w") as log:
            driver = subprocess.Popen(
                cli_command(*arguments), stdout=log, stderr=log, env=self._environment
            )
        self.started.append(driver)
        return driver

    def says(self, name):
        return self._log(name).read_text()

    def wait(self, name, moment):
        end = time.monotonic() + 240 * PATIENCE
        while not moment():
            assert time.monotonic() < end, self.says(name)
            time.sleep(0.1)

    def _log(self, name):
        return self._folder / f"{name}.log"


def last_step(root):
    rows = read_json_lines(SweepFolder(root).trial("t0000").metrics_file)
    return max((row["step"] for row in rows), default=0)


def test_sweeps_on_one_cluster_leave_each_other_alone(cluster, write_experiment, tmp_path):
    sections = {
        "train": {"max_steps": 5000, "warmup_steps": 2, "batch_size": 4, "log_every": 1},
        "sweep": {
            "num_trials": 2,
            "scheduler": {"type": "fifo"},
            "search_space": {"lora.rank": {"type": "choice", "values": [2, 4]}},
        },
    }
    files, roots = {}, {}
    for name in ("one", "two", "late"):
        files[name], roots[name] = write_experiment(name, **sections)
    drivers = Drivers(cluster, tmp_path)
    asleep = []  # they hold a CPU without using it, which the others start sooner for
    try:
        one = drivers.start("one", "sweep", files["one"])
        drivers.wait("one", lambda: last_step(roots["one"]))
        first = put_to_sleep(asleep)
        two = drivers.start("two", "sweep", files["two"])
        drivers.wait("two", lambda: last_step(roots["two"]))
        second = put_to_sleep(asleep)
        # The executors hold every CPU, and both sweeps go on.
        done = last_step(roots["one"])
        first.resume()
        drivers.wait("one", lambda: last_step(roots["one"]) > done)
        first.suspend()

        assert drivers.start("again", "resume", roots["one"]).wait(60 * PATIENCE) == 2
        assert f"is driven by process {one.pid} on" in drivers.says("again")

        drivers.start("late", "sweep", files["late"])
        line = "executors: waiting for 1 CPU: CPU 2 of 2 in use"
        drivers.wait("late", lambda: line in drivers.says("late"))
        first.resume()
        one.kill()
        drivers.wait("late", lambda: last_step(roots["late"]))
        assert "what was waited for is there" in drivers.says("late")

        done = last_step(roots["two"])
        second.resume()
        drivers.wait("two", lambda: last_step(roots["two"]) > done + 2)
        two.send_signal(signal.SIGTERM)
        assert two.wait(120 * PATIENCE) == 3, drivers.says("two")
    finally:
        for driver in drivers.started:
            driver.kill()
            driver.wait()
        for worker in asleep:
            with suppress(psutil.NoSuchProcess):
                worker.resume()


def put_to_sleep(asleep):
    """Stop the one training process that is not among those asleep, where it stands."""
    (worker,) = (each for each in train_workers() if each not in asleep)
    worker.suspend()
    asleep.append(worker)
    return worker
