"""A sweep on a cluster of its own, struck by a fault and resumed until it ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
from clusters import SETTINGS, start_head
from made import cli_command, cli_environment

from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep.ledger import events
from tests.faults.files import Damage
from tests.faults.plan import HALFWAY, KILLED, Change, Fault
from tests.faults.small import write_inputs, write_sweep
from tests.faults.verdict import Verdict, compare, seconds_to_next_step, steps_repeated

PATIENCE = float(os.environ.get("RAYTUNE_VLM_TEST_PATIENCE", "1"))
LIFE_S = 300 * PATIENCE
GONE_S = 30 * PATIENCE
TMPFS = "48m"
OF_A_SWEEP = ("BoardState", "Proxy", "ResourceTrainable", "TrainController", "TrainWorker")
"""Actors that end with their driver; a proxy has two names, one from `tune.with_resources`."""
HERE = Path(__file__).parent


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
        os.environ |= {
            **SETTINGS,
            "PYTHONPATH": f"{HERE / 'strike'}:{HERE.parents[1]}",
            "RAYTUNE_VLM_TEST_FAULTS": str(self._plans),
        }
        self._cluster = start_head(num_cpus=3)
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    def undisturbed(self) -> float:
        """The sweep that nothing happens to; the seconds that it takes."""
        file = write_sweep(self._folder, self._folder / "runs", "undisturbed")
        self._write_plan({})
        began = time.monotonic()
        log = self._folder / "undisturbed.log"
        assert self._life(log, "sweep", file) == 0, log.read_text()
        self._trace = self._keep_trace("undisturbed")
        return time.monotonic() - began

    def strike(self, fault: Fault) -> Verdict:
        """Let a fault strike; what came of it."""
        name = fault.name.replace(" ", "-").replace("'", "")
        storage = self._folder / ("mounted" if fault.on_tmpfs else "runs")
        log = self._folder / f"{name}.log"  # it outlives the storage
        plan = fault.plan(self._seed, self._trace)
        verdict = Verdict(fault.name, place_of(fault, plan), "")
        if fault.on_tmpfs and not can_mount(self._folder / "probe"):
            verdict.ended = "not run: takes the right to mount"
            return verdict
        with mounted(storage) if fault.on_tmpfs else nullcontext():
            file = write_sweep(self._folder, storage, name, **fault.changes)
            self._write_plan({**plan, "root": str(storage / name), "storage": str(storage)})
            statuses = self._lives(fault, verdict, file, log)
            verdict.ended = ending(statuses)
            self._judge(fault, verdict, self._keep_trace(name), log.read_text())
            if statuses[-1] == 0:
                compare(verdict, self._whole, storage / name, without=fault.without)
        verdict.problems += self._left_behind()
        return verdict

    def _lives(self, fault: Fault, verdict: Verdict, file: Path, log: Path) -> list[int]:
        """The exit statuses of a driver and of those that resume after it."""
        storage, root = file.parent, file.with_suffix("")
        statuses: list[int] = []
        before: list[dict[str, Any]] = []
        for expected in fault.ends:
            command = ("resume", root) if statuses else ("sweep", file)
            statuses.append(self._life(log, *command))
            self._give_back(storage)
            if statuses[-1] != expected:
                verdict.problems.append(f"ended with {statuses}, not {list(fault.ends)}")
                break
            now = events(root / "ledger.jsonl")
            if now[: len(before)] != before:
                verdict.problems.append("what the ledger had said is gone")
            before = now
            if fault.name == HALFWAY and len(statuses) == 1:
                shutil.copytree(root, self._halfway)
        return statuses

    @staticmethod
    def _judge(fault: Fault, verdict: Verdict, trace: list[dict[str, Any]], said: str) -> None:
        """What the trace and the console tell."""
        if not any("struck" in row for row in trace):
            verdict.problems.append("the fault never struck")
        if fault.says not in said:
            verdict.problems.append(f"nothing said of {fault.says!r}")
        verdict.repeated = str(steps_repeated(trace))
        if not fault.repeats and verdict.repeated != "0":
            verdict.problems.append(f"{verdict.repeated} steps repeated")
        seconds = seconds_to_next_step(trace)
        verdict.next_step = "-" if seconds is None else f"{seconds:.0f}"

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
        log = self._folder / f"{name}.log"
        status = self._life(log, "resume", root)
        file.write_text(whole)
        refused = "refused, status 2" if status == 2 else ending([status])
        verdict = Verdict(change.name, change.where, refused)
        if status != change.end:
            verdict.problems.append(f"ended with {status}, not {change.end}")
        if change.says not in log.read_text():
            verdict.problems.append(f"nothing said of {change.says!r}")
        if status == 0:
            verdict.ended = "told, went on"
            self._keep_trace(name)
            compare(verdict, self._whole, root, without=None)
        elif (root / "ledger.jsonl").read_bytes() != ledger:
            verdict.problems.append("the ledger was written to")
        return verdict

    def damage(self, damage: Damage) -> Verdict:
        """Damage files of the undisturbed sweep, which need no process."""
        return damage(SweepFolder(self._whole), random.Random(f"{self._seed}/files"))

    def _life(self, log_file: Path, *arguments: object) -> int:
        """One process of the command line; its exit status."""
        environment = {**cli_environment(), "RAY_ADDRESS": self._cluster.address}
        with log_file.open("a") as log:
            command = cli_command(*arguments)
            driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                return driver.wait(LIFE_S)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()
                log.write("killed by the test: it did not end\n")
                return -1

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


def can_mount(folder: Path) -> bool:
    """Whether this user may mount something here."""
    try:
        with mounted(folder):
            return True
    except subprocess.CalledProcessError:
        folder.rmdir()
        return False


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
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
