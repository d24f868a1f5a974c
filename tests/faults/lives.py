"""A sweep on a cluster of its own, struck by a fault and resumed until it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from made import cli_command, cli_environment

from raytune_vlm.records import read_json_lines
from tests.faults.files import damaged_files
from tests.faults.plan import HALFWAY, KILLED, Change, Fault
from tests.faults.small import write_inputs, write_sweep
from tests.faults.verdict import Verdict, compare, seconds_to_next_step, steps_repeated

PATIENCE = float(os.environ.get("RAYTUNE_VLM_TEST_PATIENCE", "1"))
LIFE_S = 300 * PATIENCE
GONE_S = 30 * PATIENCE
TMPFS = "48m"
OF_A_SWEEP = ("BoardState", "Proxy", "TrainController", "TrainWorker")
"""Actors that end with their driver."""
HERE = Path(__file__).parent
RAY_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}


class Lives:
    """Sweeps below a folder; a context manager that holds the cluster.

    Parameters
    ----------
    folder
        Everything is below it.
    seed
        Draws where faults strike.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._plans = folder / "plan"
        self._whole = folder / "runs" / "undisturbed"
        self._halfway = folder / "halfway"
        self._trace: list[dict[str, Any]] = []
        write_inputs(folder)
        self._plans.mkdir()

    def __enter__(self) -> Lives:
        from ray.cluster_utils import Cluster

        os.environ |= {
            **RAY_SETTINGS,
            "PYTHONPATH": f"{HERE / 'strike'}:{HERE.parents[1]}",
            "RAYTUNE_VLM_TEST_FAULTS": str(self._plans),
        }
        head = {"num_cpus": 3, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    def undisturbed(self) -> float:
        """The sweep that nothing happens to; the seconds that it takes."""
        file = write_sweep(self._folder, self._folder / "runs", "undisturbed")
        self._write_plan({})
        began = time.monotonic()
        status = self._life(file, "sweep", file)
        assert status == 0, self._said(file)
        self._trace = self._keep_trace("undisturbed")
        return time.monotonic() - began

    def strike(self, fault: Fault) -> Verdict:
        """Let a fault strike; what came of it."""
        name = fault.name.replace(" ", "-").replace("'", "")
        storage = self._folder / ("mounted" if fault.on_tmpfs else "runs")
        with mounted(storage) if fault.on_tmpfs else here():
            file = write_sweep(self._folder, storage, name, **fault.changes)
            # The log has to outlive the storage.
            log = self._folder / f"{name}.yaml"
            plan = fault.plan(self._seed, self._trace)
            verdict = Verdict(fault.name, place_of(fault, plan), "")
            self._write_plan({**plan, "root": str(storage / name), "storage": str(storage)})
            ended = []
            for number, expected in enumerate(fault.ends):
                command = ("resume", storage / name) if number else ("sweep", file)
                ended.append(self._life(log, *command))
                self._give_back(storage)
                if fault.name == HALFWAY and number == 0:
                    shutil.copytree(storage / name, self._halfway)
                if ended[-1] != expected:
                    verdict.problems.append(f"ended with {ended}, not {list(fault.ends)}")
                    break
            verdict.ended = ending(ended)
            trace = self._keep_trace(name)
            if not any("struck" in row for row in trace):
                verdict.problems.append("the fault never struck")
            if fault.says not in self._said(log):
                verdict.problems.append(f"nothing said of {fault.says!r}")
            verdict.repeated = str(steps_repeated(trace))
            if not fault.repeats and verdict.repeated != "0":
                verdict.problems.append(f"{verdict.repeated} steps repeated")
            seconds = seconds_to_next_step(trace)
            verdict.next_step = "-" if seconds is None else f"{seconds:.0f}"
            if ended[-1] == 0:
                compare(verdict, self._whole, storage / name, without=fault.without)
        verdict.problems += self._left_behind()
        return verdict

    def resume_changed(self, change: Change) -> Verdict:
        """Resume what was killed half-way, with something changed."""
        name = change.name.replace(" ", "-")
        root = self._folder / "runs" / name
        shutil.copytree(self._halfway, root)
        file = self._folder / change.file if "/" in change.file else root / change.file
        whole, ledger = file.read_text(), (root / "ledger.jsonl").read_bytes()
        assert change.before in whole
        file.write_text(whole.replace(change.before, change.after, 1))
        self._write_plan({})
        log = self._folder / f"{name}.yaml"
        status = self._life(log, "resume", root)
        file.write_text(whole)
        refused = "refused, status 2" if status == 2 else ending([status])
        verdict = Verdict(change.name, change.where, refused)
        if status != change.end:
            verdict.problems.append(f"ended with {status}, not {change.end}")
        if change.says not in self._said(log):
            verdict.problems.append(f"nothing said of {change.says!r}")
        if status == 0:
            verdict.ended = "told, went on"
            self._keep_trace(name)
            compare(verdict, self._whole, root, without=None)
        elif (root / "ledger.jsonl").read_bytes() != ledger:
            verdict.problems.append("the ledger was written to")
        return verdict

    @property
    def can_change(self) -> bool:
        """Whether there is a sweep that was killed half-way."""
        return self._halfway.exists()

    def damaged_files(self) -> list[Verdict]:
        """Rows of what needs no process."""
        return damaged_files(self._whole, self._seed)

    def _life(self, file: Path, *arguments: object) -> int:
        """One process of the command line; its exit status."""
        environment = {**cli_environment(), "RAY_ADDRESS": self._cluster.address}
        with file.with_suffix(".log").open("a") as log:
            command = cli_command(*arguments)
            driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                return driver.wait(LIFE_S)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()
                log.write("killed by the test: it did not end\n")
                return -1

    @staticmethod
    def _said(file: Path) -> str:
        return file.with_suffix(".log").read_text()

    def _write_plan(self, plan: dict[str, Any]) -> None:
        (self._plans / "plan.json").write_text(json.dumps(plan))

    def _keep_trace(self, name: str) -> list[dict[str, Any]]:
        kept = self._folder / f"{name}.trace.jsonl"
        kept.touch()
        trace = self._plans / "trace.jsonl"
        if trace.exists():  # else not even the first point was passed
            trace.rename(kept)
        return read_json_lines(kept)

    def _left_behind(self) -> list[str]:
        """Workers that are still there some time after their driver; they are ended here."""
        end = time.monotonic() + GONE_S
        while left := workers():
            if time.monotonic() > end:
                names = [process.cmdline()[0] for process in left]
                for process in left:
                    process.kill()
                return [f"left behind: {', '.join(names)}"]
            time.sleep(0.2)
        return []

    @staticmethod
    def _give_back(storage: Path) -> None:
        """What a fault has taken from the storage."""
        if (storage / "filler").exists():
            (storage / "filler").unlink()
        if storage.is_mount() and not any(storage.iterdir()):
            subprocess.run(["umount", storage], check=True)


def workers() -> list[psutil.Process]:
    """Actors of sweeps below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and any(name in title for name in OF_A_SWEEP):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@contextmanager
def here() -> Iterator[None]:
    """Nothing to mount."""
    yield


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        shutil.copytree(folder, folder.with_name("mounted-copy"), dirs_exist_ok=True)
        while folder.is_mount():
            subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def place_of(fault: Fault, plan: dict[str, Any]) -> str:
    """Where a fault struck, for the table."""
    narrowed = " ".join(map(str, plan.get("only", {}).values()))
    point = " ".join(filter(None, (narrowed, fault.point)))
    return f"{fault.where} ({point} {plan['number']})"


def ending(ended: list[int]) -> str:
    """How the lives of a driver ended, in words."""
    if ended == [0]:
        return "went on"
    first = "killed" if ended[0] == KILLED else f"status {ended[0]}"
    return first + (", resumed" if ended[1:] == [0] else f", then {ended[1:]}" * bool(ended[1:]))
