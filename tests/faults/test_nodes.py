"""Several nodes on one machine: whatever dies in mid-run, the result is that of a quiet run."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
from clusters import LEAN, OF_A_CLUSTER, SETTINGS, start_head
from made import cli_command, cli_environment

from raytune_vlm.records import SweepFolder, read_json_lines

pytestmark = [pytest.mark.integration, pytest.mark.slow, *OF_A_CLUSTER]

STEPS = 100
HANGS_AFTER = 8
"""Steps of two micro-batches until `hang/sitecustomize.py` acts."""
PATIENCE = float(os.environ.get("RAYTUNE_VLM_TEST_PATIENCE", "1"))
"""Above 1 on a machine so busy that a step or the start of a process takes far longer."""


def processes_of(node):
    """The processes that a node has started, each with its command line."""
    found = []
    for raylet in node.all_processes.get("raylet", []):
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(raylet.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    found.append((process, " ".join(process.cmdline())))
    return found


class Nodes:
    """A head that only drives, and nodes with room for one executor each."""

    def __init__(self):
        self.cluster = start_head(num_cpus=1)

    def add(self):
        return self.cluster.add_node(num_cpus=2, **LEAN)

    def find(self, what, nodes):
        """The process of an actor and the node that it runs on, once there is one: a worker whose
        raylet is gone may log some steps before the next one begins."""
        end = time.monotonic() + 60 * PATIENCE
        while time.monotonic() < end:
            for node in nodes:
                for process in processes_of(node):
                    if what in process[1]:
                        return process[0], node
            time.sleep(0.1)
        raise AssertionError(f"no {what}")

    def worker(self):
        """The training process and the node that it runs on."""
        return self.find("TrainWorker", self.cluster.worker_nodes)

    def kill_board(self):
        self.find("BoardState", [self.cluster.head_node])[0].kill()

    def kill_worker(self):
        self.worker()[0].kill()

    def kill_raylet(self):
        node = self.worker()[1]
        node.kill_raylet()
        self.cluster.remove_node(node, allow_graceful=False)

    def kill_node(self):
        self.cluster.remove_node(self.worker()[1], allow_graceful=False)

    def announce_end(self):
        """What a cloud does some time before it takes a node away; it is not taken here."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        self.announced = self.worker()[1]
        client = GcsClient(address=self.cluster.gcs_address)
        deadline = int((time.time() + 600) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client.drain_node(self.announced.node_id, reason, "test", deadline)

    def kill_all(self):
        """The last node with room, and the one whose end was announced."""
        self.kill_node()
        self.cluster.remove_node(self.announced, allow_graceful=False)

    def scraped(self):
        """What the metrics endpoints of all nodes say."""
        text = ""
        for node in self.cluster.global_state.node_table():
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            try:
                text += urllib.request.urlopen(url, timeout=2).read().decode()
            except (OSError, HTTPException):
                continue  # one that has just begun, or a dead one, whose port may be another's
        return text


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A head alone; what is set here reaches every process of theirs."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "5000")
    monkeypatch.setenv("RAYTUNE_VLM_TEST_HANG", str(tmp_path / "hung"))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'hang'}:{cli_python_path()}")
    made = Nodes()
    yield made
    made.cluster.shutdown()


def cli_python_path():
    return str(Path(__file__).parents[2])


def start(nodes, file, *overrides):
    """`train` on the cluster, with what it says in a file beside."""
    environment = {**cli_environment(), "RAY_ADDRESS": nodes.cluster.address}
    with file.with_suffix(".log").open("a") as log:
        command = cli_command("train", file, *overrides)
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def last_step(folder):
    return max((row["step"] for row in read_json_lines(folder.metrics_file)), default=0)


def wait_for_step(folder, step, driver, log):
    end = time.monotonic() + 240 * PATIENCE
    while last_step(folder) < step:
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def tell(fault, seconds):
    """From a fault to steps that had not been done before."""
    sys.stdout.write(f"\n{fault}: {seconds:.1f} s\n")
    sys.stdout.flush()


def outcome(folder):
    last = folder.checkpoint(STEPS)
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    digests = [hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names]
    rows = read_json_lines(folder.metrics_file)
    return digests, [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def experiment_sections():
    train = {
        "max_steps": STEPS,
        "warmup_steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "cpus_per_worker": 2,
        "checkpoint_every": 5,
        "log_every": 1,
        "grace_s": 10 * PATIENCE,
        "hang_timeout_s": 5 * PATIENCE,
    }
    sweep = {"max_failures": 4, "max_wait_s": 60 * PATIENCE, "scheduler": {"type": "fifo"}}
    return {"train": train, "sweep": sweep}


@contextmanager
def scraping(nodes):
    """The gauges that the nodes show meanwhile: name, and whether it is the trial's."""
    seen, over = set(), threading.Event()

    def scrape():
        # Each look costs every node's agent a page of numbers.
        while not over.wait(5):
            for name, tags in re.findall(r"^ray_raytune_vlm_(\w+)\{(.*?)\}", nodes.scraped(), re.M):
                seen.add((name, 'trial_id="t0000"' in tags))

    watcher = threading.Thread(target=scrape, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


@pytest.mark.timeout(1200)
def test_whatever_dies_the_run_goes_on_or_is_resumed_to_the_same_end(nodes, write_experiment):
    for _ in range(4):
        nodes.add()
    sections = experiment_sections()
    file, root = write_experiment("faults", **sections)
    folder, log = SweepFolder(root).trial("t0000"), file.with_suffix(".log")
    with scraping(nodes) as seen:
        driver = start(nodes, file)
        what_the_driver_outlives(nodes, driver, folder, log)
        what_ends_it_with_status_3(nodes, driver, file, folder)
    # What is not known (None), as model FLOPs utilisation on a CPU, is no gauge.
    last = read_json_lines(folder.metrics_file)[-1]
    numbers = {name for name, value in last.items() if value is not None}
    assert {name for name, of_trial in seen if of_trial} >= numbers
    assert {name for name, _ in seen} >= {"executors_alive", "trials_running", "trials_ended"}

    assert start(nodes, file).wait(240 * PATIENCE) == 0, log.read_text()
    assert [row["step"] for row in read_json_lines(folder.metrics_file)] == [*range(1, STEPS + 1)]

    quiet, quiet_root = write_experiment("quiet", **sections)
    assert start(nodes, quiet).wait(240 * PATIENCE) == 0
    assert outcome(folder) == outcome(SweepFolder(quiet_root).trial("t0000"))


def what_the_driver_outlives(nodes, driver, folder, log):
    wait_for_step(folder, HANGS_AFTER, driver, log)
    began = time.monotonic()
    wait_for_step(folder, HANGS_AFTER + 1, driver, log)
    tell("hang", time.monotonic() - began)
    (stacks,) = folder.root.glob("stacks_*.txt")
    assert "sitecustomize.py" in stacks.read_text() and "nothing moved for" in stacks.read_text()
    for step, fault in (
        (12, nodes.kill_worker),
        (17, nodes.kill_raylet),
        (22, nodes.kill_node),
        (27, nodes.announce_end),
    ):
        wait_for_step(folder, step, driver, log)
        lives, began = log.read_text().count("goes on"), time.monotonic()
        fault()
        # Who is killed with its node may log another step or two.
        while log.read_text().count("goes on") == lives:
            assert driver.poll() is None and time.monotonic() < began + 240 * PATIENCE
            time.sleep(0.1)
        wait_for_step(folder, last_step(folder) + 1, driver, log)
        tell(fault.__name__, time.monotonic() - began)
    said = log.read_text()
    assert "nothing moved for" in said and "a node is about to go" in said
    # The hang and three deaths; who leaves its node in time has not failed.
    assert said.count("its worker died") == 4 and "attempt 5" in said and "attempt 6" not in said


def what_ends_it_with_status_3(nodes, driver, file, folder):
    log = file.with_suffix(".log")

    def ends(driver, fault, name):
        """The line that the run ends with, after some steps and the fault."""
        wait_for_step(folder, last_step(folder) + 7, driver, log)
        began = time.monotonic()
        fault(driver)
        assert driver.wait(200 * PATIENCE) == 3, log.read_text()
        tell(f"{name}, to status 3", time.monotonic() - began)
        line = log.read_text().strip().splitlines()[-1]
        assert line.startswith(("error: ", "stopped")), log.read_text()
        return line

    line = ends(driver, lambda driver: nodes.kill_all(), "last node")
    assert "executor-0 has had no workers for" in line and "it asks for 1 x 2 CPU" in line
    assert "1 CPU and 0 GPU on 1 nodes" in line and "dead: none" not in line and "resume" in line
    nodes.add()

    line = ends(start(nodes, file), lambda driver: nodes.kill_board(), "board")
    assert "the board died" in line and "resume" in line

    ends(start(nodes, file), lambda driver: driver.send_signal(signal.SIGTERM), "SIGTERM")
    assert folder.checkpoint(last_step(folder)).exists(), "a step was lost"
