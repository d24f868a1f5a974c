"""SIGKILL of a sweep's driver at random points, then `resume`; beside it `Tuner.restore`.

    python benchmarks/driver_kills.py [--kills 20] [--kills-per-sweep 7] [--way ours --way tune]

A small demo sweep (ASHA, TPE, one executor) runs undisturbed, then again with kills: the same
sweep is killed `--kills-per-sweep` times, each time after another life was started by `resume`. The
moments are drawn: a share of all that the undisturbed sweep writes (steps, and events of the
ledger), and a delay of up to a step. The next life begins when every process of the last one is
gone.

The other way is a plain Ray Tune sweep of the same trials (`driver_kills_tune.py`: function
trainable, ASHA, TPE, a checkpoint as often as ours) killed at the same shares of its steps and
started again by `Tuner.restore`, with Ray's defaults.

A step counts as repeated if it was done before a kill and is done again after it, or if its trial
is forgotten. One trial runs at a time, so a kill has one running trial.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from sweep_plain import Inputs, demo_experiment, places

from raytune_vlm.cli import DEMO_EXPERIMENT
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import SweepFolder, read_json, read_json_lines
from raytune_vlm.sweep.runner import prepare_only

NUM_TRIALS, STEPS, RUNG, EVERY, FACTOR, STARTUP = 8, 36, 9, 3, 2, 3
OVERRIDES = (
    f"train.max_steps={STEPS}",
    "train.warmup_steps=3",
    f"train.checkpoint_every={EVERY}",
    "train.log_every=1",
    f"sweep.num_trials={NUM_TRIALS}",
    "sweep.num_executors=1",
    "sweep.num_replicates=0",
    "evaluation.metrics=[nted@donut, field_f1@donut]",
    f"sweep.searcher={{type: tpe, num_startup_trials: {STARTUP}}}",
    f"sweep.scheduler={{type: asha, grace_period: {RUNG}, reduction_factor: {FACTOR}}}",
)
PATIENCE_S = 600.0
"""How long a life may take until a drawn point."""
MOST_STARTS = 3
"""A life is started again if it fails by itself: on a busy machine Ray may not come up."""
LINGER_S = 30.0
"""How long a dead driver's other processes may live on."""
Row = tuple[str, int, float]
"""A step that was done: trial, number, time."""


@dataclass
class Way:
    """One way of running the sweep, in a folder of its own."""

    folder: Path
    work: Path

    def command(self) -> list[str]:
        """What starts it, or starts it again."""
        raise NotImplementedError

    def rows(self) -> list[Row]:
        """The steps on disk."""
        raise NotImplementedError

    def progress(self) -> int:
        """What is on disk, as a number that grows."""
        return len({row[:2] for row in self.rows()})

    def is_closing(self) -> bool:
        """Whether no steps are left to do."""
        return (self.folder / "result.json").exists()

    def outcome(self) -> dict[str, Any]:
        """`proposals`, `winner`, and `ended`, the trials that there are at the end."""
        raise NotImplementedError


class Ours(Way):
    """`raytune-vlm sweep`, then `raytune-vlm resume`."""

    def command(self) -> list[str]:
        program = [sys.executable, "-m", "raytune_vlm"]
        if (self.folder / "experiment.json").exists():
            return [*program, "resume", str(self.folder)]
        overrides = [*places(self.work), f"name={self.folder.name}", *OVERRIDES]
        return [*program, "sweep", str(DEMO_EXPERIMENT), *overrides]

    def rows(self) -> list[Row]:
        found = []
        for file in sorted(self.folder.glob("trials/*/metrics.jsonl")):
            rows = read_json_lines(file)
            found += [(file.parent.name, row["step"], row["time"]) for row in rows]
        return found

    def events(self) -> list[dict[str, Any]]:
        """The ledger."""
        file = self.folder / "ledger.jsonl"
        return read_json_lines(file) if file.exists() else []

    def progress(self) -> int:
        again = ("resumed", "started")
        return super().progress() + sum(row["event"] not in again for row in self.events())

    def is_closing(self) -> bool:
        endings = ("finished", "stopped", "failed")
        return sum(row["event"] in endings for row in self.events()) == NUM_TRIALS

    def outcome(self) -> dict[str, Any]:
        rows, result = self.events(), SweepFolder(self.folder).result()
        assert result is not None
        ended = [r["trial_id"] for r in rows if r["event"] in ("finished", "stopped", "failed")]
        assert len(ended) == len(set(ended)) == NUM_TRIALS, f"ended: {ended}"
        return {
            "proposals": [row["recipe"] for row in rows if row["event"] == "proposed"],
            "scores": sorted(
                (r["trial_id"], r["step"], r["scores"]) for r in rows if r["event"] == "scored"
            ),
            "winner": (result.winner, result.winner_step, result.naive),
            "touches": sum(row["event"] == "touched" for row in rows),
            "ended": ended,
            "run_again": self._run_again(),
        }

    def _run_again(self) -> list[str]:
        """Trials that were started after they had ended, or made a step in a later life.

        In the same life a stopped trial may be in a step when the scheduler stops it.
        """
        ended: set[str] = set()
        next_life: dict[str, float] = {}
        again = []
        for row in self.events():
            if row["event"] in ("finished", "stopped", "failed"):
                ended.add(row["trial_id"])
            elif row["event"] == "started" and row["trial_id"] in ended:
                again.append(row["trial_id"])
            elif row["event"] == "resumed":
                next_life |= dict.fromkeys(ended - next_life.keys(), row["time"])
        return again + [name for name, _, at in self.rows() if at > next_life.get(name, at)]


class PlainTune(Way):
    """Ray Tune's own sweep, then `Tuner.restore`."""

    def command(self) -> list[str]:
        self.folder.mkdir(exist_ok=True)
        task = {
            "folder": str(self.folder),
            "inputs": str(self.work / "inputs.json"),
            "log": str(self.folder / "steps.jsonl"),
            "result": str(self.folder / "result.json"),
            "rungs": [RUNG * FACTOR**k for k in range(3) if RUNG * FACTOR**k <= STEPS],
            "checkpoint_every": EVERY,
            "reduction_factor": FACTOR,
            "num_trials": NUM_TRIALS,
            "num_startup_trials": STARTUP,
        }
        (self.folder / "task.json").write_text(json.dumps(task))
        script = Path(__file__).with_name("driver_kills_tune.py")
        return [sys.executable, str(script), str(self.folder / "task.json")]

    def rows(self) -> list[Row]:
        file = self.folder / "steps.jsonl"
        rows = read_json_lines(file) if file.exists() else []
        return [(row["trial"], row["step"], row["time"]) for row in rows]

    def outcome(self) -> dict[str, Any]:
        trials = read_json(self.folder / "result.json")
        best = max(trials.values(), key=lambda trial: trial["score"])
        finished: dict[str, float] = {}
        again = set()
        for name, step, at in self.rows():
            if at > finished.get(name, at):
                again.add(name)
            if step == STEPS:
                finished.setdefault(name, at)
        return {
            "proposals": [trial["recipe"] for trial in trials.values()],
            "winner": (best["recipe"], best["step"], best["score"]),
            "ended": list(trials),
            "run_again": sorted(again),
        }


@dataclass
class Disturbed:
    """A sweep with its kills."""

    way: Way
    kills: list[float] = field(default_factory=list)
    """Times."""
    done: set[Row] = field(default_factory=set)
    """Every step of every life; a step that was done again has two times."""
    lingered: list[float] = field(default_factory=list)
    """Seconds until all processes of a dead driver were gone."""

    def write(self, file: Path) -> None:
        """Note it: a command that was stopped goes on with the next sweep."""
        seen = {"kills": self.kills, "done": sorted(self.done), "lingered": self.lingered}
        file.write_text(json.dumps(seen))

    @classmethod
    def read(cls, way: Way, file: Path) -> Disturbed:
        """What `write` has written."""
        seen = json.loads(file.read_text())
        done = {(name, step, at) for name, step, at in seen["done"]}
        return cls(way, seen["kills"], done, seen["lingered"])

    def repeated(self) -> list[int]:
        """Steps done again, or forgotten with their trial, kill by kill.

        An executor lives a few seconds longer than its driver: what it does then and is done again
        counts too.
        """
        known, found = set(self.way.outcome()["ended"]), []
        rows = sorted(self.done, key=lambda row: row[2])
        for before, at, until in zip(
            [0.0, *self.kills], self.kills, [*self.kills[1:], math.inf], strict=False
        ):
            seen = {row[:2] for row in rows if row[2] <= at}
            lost = len({row[:2] for row in rows if before < row[2] <= at and row[0] not in known})
            for row in rows:
                if at < row[2] <= until:
                    lost += row[:2] in seen
                    seen.add(row[:2])
            found.append(lost)
        return found


def start(way: Way, log: Path) -> subprocess.Popen[bytes]:
    """A life."""
    dropped = ("RAY_ADDRESS",)
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment["HF_HUB_OFFLINE"] = "1"
    with log.open("ab") as stream:
        return subprocess.Popen(way.command(), stdout=stream, stderr=stream, env=environment)


def end(process: subprocess.Popen[bytes]) -> float:
    """SIGKILL of the driver alone; seconds until the processes that it leaves behind are gone."""
    left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    while any(map(_lives, left)) and time.monotonic() < began + LINGER_S:
        time.sleep(0.1)
    seconds = time.monotonic() - began
    for other in filter(_lives, left):
        other.kill()
    return seconds


def _lives(process: psutil.Process) -> bool:
    """Whether it is more than an entry that nobody has taken notice of."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def undisturbed(way: Way) -> tuple[int, dict[str, Any]]:
    """Run a sweep to its end: how far it comes, and what comes of it."""
    log = way.work / f"{way.folder.name}.log"
    if not (way.folder / "result.json").exists() and start(way, log).wait():
        raise click.ClickException(f"the undisturbed sweep failed: {log.read_text()[-2000:]}")
    return way.progress(), way.outcome()


def life(way: Way, point: float, delay: float) -> tuple[float, float] | None:
    """A life up to a point, and its kill: when, and how long it lingered; None if it ended.

    Raises
    ------
    ClickException
        If it failed, or did not come to that point.
    """
    log, began = way.work / f"{way.folder.name}.log", time.time()
    for _ in range(MOST_STARTS):
        process = start(way, log)
        while process.poll() is None and time.time() < began + PATIENCE_S:
            # Of its own: a life is not killed before it has done anything.
            own = any(row[2] > began for row in way.rows()) or way.is_closing()
            if own and way.progress() >= point:
                time.sleep(delay)
                return time.time(), end(process)
            time.sleep(0.02)
        if process.poll() == 0:
            return None
        if process.poll() is None:
            end(process)
            break
    raise click.ClickException(f"no life came to {point:.0f}: {log.read_text()[-2000:]}")


def disturbed(way: Way, points: list[float], delays: list[float]) -> Disturbed:
    """Run a sweep with a kill at each of some points, to its end."""
    found = Disturbed(way)
    for point, delay in zip(points, delays, strict=True):
        killed = life(way, point, delay)
        if killed is None:
            break
        found.kills.append(killed[0])
        found.lingered.append(killed[1])
        found.done |= set(way.rows())
        print(f"{way.folder.name}: killed at {way.progress()}", flush=True)
    else:
        life(way, math.inf, 0.0)
    found.done |= set(way.rows())
    return found


def summary(sweeps: list[Disturbed], quiet: dict[str, Any]) -> dict[str, Any]:
    """The figures of one way."""
    outcomes = [sweep.way.outcome() for sweep in sweeps]
    repeated = [steps for sweep in sweeps for steps in sweep.repeated()]
    kinds = [kind for kind in ("proposals", "scores", "winner", "touches") if kind in quiet]
    return {
        "kills": len(repeated),
        "repeated": repeated,
        "repeated_max": max(repeated),
        "repeated_mean": round(statistics.mean(repeated), 2),
        "finished_run_again": sum(len(outcome["run_again"]) for outcome in outcomes),
        "sweeps": len(sweeps),
        **{f"same_{kind}": sum(o[kind] == quiet[kind] for o in outcomes) for kind in kinds},
        "seconds_to_be_gone": round(max(s for sweep in sweeps for s in sweep.lingered), 1),
    }


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--kills-per-sweep", default=7, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--way", "ways", type=click.Choice(["ours", "tune"]), multiple=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep all here, and go on with it.")
def main(
    kills: int, kills_per_sweep: int, seed: int, ways: tuple[str, ...], work: Path | None
) -> None:
    """Run both ways one after the other and print what was repeated."""
    classes = {"ours": Ours, "tune": PlainTune}
    chance = random.Random(seed)
    drawn = [
        sorted(chance.random() for _ in range(min(kills_per_sweep, kills - begun)))
        for begun in range(0, kills, kills_per_sweep)
    ]
    delays = [[chance.uniform(0, 0.3) for _ in shares] for shares in drawn]
    work = (work or Path(tempfile.mkdtemp(prefix="raytune_vlm-benchmark-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    with Monitor() as monitor:
        experiment = demo_experiment(work, OVERRIDES)
        Inputs.of(experiment, prepare_only(experiment, monitor=monitor)).write(work / "inputs.json")
    found = {}
    for name in ways or tuple(classes):
        total, quiet = undisturbed(classes[name](work / f"{name}-quiet", work))
        print(f"{name}: undisturbed sweep: {total} steps and events, winner {quiet['winner']}")
        sweeps = []
        for number, shares in enumerate(drawn):
            way = classes[name](work / f"{name}-{number}", work)
            record = work / f"{name}-{number}.json"
            if not record.exists():
                shutil.rmtree(way.folder, ignore_errors=True)
                disturbed(way, [share * total for share in shares], delays[number]).write(record)
            sweeps.append(Disturbed.read(way, record))
            print(f"{name} {number}: kills at {[round(share, 2) for share in shares]}", end=", ")
            print(f"steps repeated {sweeps[-1].repeated()}", flush=True)
        found[name] = summary(sweeps, quiet)
    print(json.dumps({"load": os.getloadavg()[0], **found}, indent=1))


if __name__ == "__main__":
    main()
