"""What a run waits for on a cluster that others use too, told at once and again every minute."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.holders import holders

PATIENCE_S = 5
"""Ray needs some time to place what there is room for."""

AGAIN_AFTER_S = 60


class Waiting:
    """Looks at the placement groups of this run that are not placed: its executors' workers."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._told: float | None = None

    def look(self, absent_s: float) -> None:
        """Say what is waited for, and when that is over.

        `absent_s`: seconds since the last sign of life of the executor that is silent longest.
        """
        import ray
        from ray.util import placement_group_table

        if absent_s < PATIENCE_S:
            if self._told is not None:
                self._monitor.say("executors: what was waited for is there")
            self._told = None
            return
        asked = pending(placement_group_table(), ray.get_runtime_context().get_job_id())
        now = time.monotonic()
        if asked and (self._told is None or now - self._told >= AGAIN_AFTER_S):
            self._told = now
            wanted = " + ".join(f"{amount:g} {kind}" for kind, amount in asked.items())
            self._monitor.say(f"executors: waiting for {wanted}: {holders()}")


def wait_for_a_cpu(monitor: Monitor) -> None:
    """Wait until a task would find a CPU, and say so: Ray Data waits without a word."""
    import ray

    for second in itertools.count():
        if ray.available_resources().get("CPU", 0.0) >= 1:
            return
        if second % AGAIN_AFTER_S == PATIENCE_S:
            monitor.say(f"data: waiting for 1 CPU: {holders()}")
        time.sleep(1)


def pending(groups: Mapping[str, Mapping[str, Any]], job_id: str) -> dict[str, float]:
    """Resource -> how much of it the unplaced groups of a job ask for; a group's id ends with its
    job's."""
    asked: dict[str, float] = {}
    for group_id, group in groups.items():
        if group["state"] == "PENDING" and group_id.endswith(job_id):
            for bundle in group["bundles"].values():
                for kind, amount in bundle.items():
                    asked[kind] = asked.get(kind, 0.0) + amount
    return asked
