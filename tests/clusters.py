"""Ray on this machine, which several processes of a test join: without what only a person reads."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest

JOINED = "RAYTUNE_VLM_TEST_RAY"
"""Names the address of a cluster that the command line joins (`made.cli_environment`)."""

SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    # Idle processes less; and other users of the machine do not starve the workers.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of a cluster's processes, which all that run on it inherit."""

LEAN = {"include_log_monitor": False}
"""Arguments of a node: no process that passes on what workers print."""

OF_A_CLUSTER = (
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
)
"""Marks of tests: Ray's `Cluster` leaves sockets and processes to the garbage collector."""


def start_head(num_cpus: int) -> Any:
    """A `ray.cluster_utils.Cluster` with a head of so many CPUs, without dashboard and autoscaler.

    Set `SETTINGS` before; shut it down in the end.
    """
    from ray.cluster_utils import Cluster

    head = {"num_cpus": num_cpus, "include_dashboard": False, "no_monitor": True, **LEAN}
    return Cluster(initialize_head=True, head_node_args=head)


def joined() -> dict[str, str]:
    """What makes a command join the cluster of `JOINED`, if there is one."""
    address = os.environ.get(JOINED)
    return {} if address is None else {"RAY_ADDRESS": address}


def train_workers() -> list[psutil.Process]:
    """The training processes of the sweeps below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
