"""Schedulers compared at equal budget on recorded learning curves of real LoRA trials.

    python benchmarks/schedulers.py [--curves benchmarks/curves/demo.json.gz] [--seeds 100]
    python benchmarks/schedulers.py --seeds 400 --within 0.05 --within 0.1 [--to-end]

Asynchronous simulation: four workers, a step takes as long for every trial, and a trial's score at
a rung is the recorded one on samples of `select` (`--samples` of them, drawn anew for each seed).
For each seed the recipes come in another random order, the same for all schedulers. A scheduler
gets as many trials as it can end within the budget of steps. What it chooses is the trial with the
best score that it saw; the regret is the best true score in the table less that trial's: the score
of the complete trial on `report`, which no scheduler sees.

With `--within` it is asked instead what a winner of the same quality costs, with `--trials` recipes
for each. The winner so far is the complete trial (an adapter that is there) with the best score; a
good one is so close to the best of the table in its true score. The cost is what all workers do
until the winner is a good one, as if somebody knew; with `--to-end` what the whole sweep does. A
sweep without a good winner was in vain, and another one has to be made: costs are compared by their
expectation with such repetitions, all costs over the number of sweeps that got there (the expected
running time of Hansen et al. 2021, "COCO"). In medians it counts as endless.

Ray's rules are Ray's own classes, made by `build_scheduler` and driven with the recorded results.
Its HyperBand is missing: its first brackets end at steps (72 / 27, 72 / 81) without scores.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from ray.tune.schedulers import TrialScheduler

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.sweep.ledger import TrialState
from raytune_vlm.sweep.scheduler import Rule, decide
from raytune_vlm.sweep.search import build_scheduler

CURVES = Path(__file__).parent / "curves" / "demo.json.gz"
METRIC = "nted@donut"
NUM_WORKERS = 4
BUDGETS = (2, 4, 6)
"""Budgets of a sweep, in complete trials."""
LADDERS = ((2, 9), (2, 18), (3, 8), (3, 24))
"""Reduction factors and first rungs."""
PATIENCE = {"eager": 1, "breadth": None, "complete": 10_000}
"""Name -> `min_results`."""


@dataclass(frozen=True)
class Table:
    """Recorded curves: scores as sums and weights per sample."""

    budgets: tuple[int, ...]
    sums: NDArray[np.float64]
    """[curves, budgets, samples]"""
    weights: NDArray[np.float64]
    true: NDArray[np.float64]
    """[curves]: the complete trial on `report`."""
    train_seconds: NDArray[np.float64]
    """[curves]: CPU seconds of a step."""
    score_seconds: NDArray[np.float64]
    """[curves]: CPU seconds of a score at a rung."""

    @classmethod
    def read(cls, file: Path, metric: str) -> Table:
        """The complete curves of a file of `record_curves.py`."""
        plain = json.loads(gzip.decompress(file.read_bytes()))
        rows = [row for row in plain["curves"] if "failed" not in row]
        parts = [[entry[metric] for entry in row["select"]] for row in rows]
        reports = [row["report"][metric] for row in rows]
        # The first curves do not tell what their scores took.
        known = [row["scoring_cpu_seconds"] for row in rows if "scoring_cpu_seconds" in row]
        rungs = [row.get("scoring_cpu_seconds", float(np.median(known))) for row in rows]
        score = np.array(rungs) / len(plain["budgets"])
        report = score * plain["num_samples"]["report"] / plain["num_samples"]["select"]
        whole = np.array([row["cpu_seconds"] for row in rows])
        return cls(
            tuple(plain["budgets"]),
            np.array([[entry["sum"] for entry in part] for part in parts], dtype=float),
            np.array([[entry["weight"] for entry in part] for part in parts], dtype=float),
            np.array([sum(entry["sum"]) / sum(entry["weight"]) for entry in reports]),
            (whole - rungs - report) / plain["budgets"][-1],
            score,
        )

    def observed(self, draw: np.random.Generator, samples: int | None) -> NDArray[np.float64]:
        """[curves, budgets]: the scores on some of the samples."""
        there = self.sums.shape[2]
        chosen = draw.choice(there, samples, replace=False) if samples else np.arange(there)
        return self.sums[..., chosen].sum(-1) / self.weights[..., chosen].sum(-1)


@dataclass
class Played:
    """What a simulated sweep came to."""

    time: int = 0
    """When the last trial ended, in steps of one worker."""
    states: dict[str, TrialState] = field(default_factory=dict)
    legs: list[tuple[int, int, int, int]] = field(default_factory=list)
    """What a worker did at a time: when it began, the trial's number, from and to which step."""

    @property
    def steps(self) -> int:
        """What all workers did."""
        return sum(last - first for _, _, first, last in self.legs)

    def chosen(self) -> int:
        """The number of the trial with the best score seen, the earlier among equals."""
        best = {
            state.number: max((row[METRIC] for row in state.scored.values()), default=-1.0)
            for state in self.states.values()
        }
        return min(best, key=lambda number: (-best[number], number))

    def winners(self, end: int, scores: NDArray[np.float64]) -> list[tuple[int, int]]:
        """When which complete trial became the best so far."""
        ends = [(leg[0] + end - leg[2], leg[1]) for leg in self.legs if leg[3] == end]
        found: list[tuple[int, int]] = []
        for moment, number in sorted(ends):
            if not found or scores[number, -1] > scores[found[-1][1], -1]:
                found.append((moment, number))
        return found

    def cost(self, moment: int, train: NDArray[np.float64], score: NDArray[np.float64]) -> Cost:
        """What it cost until then, from the seconds of each trial's steps and scores."""
        steps, seconds = 0, 0.0
        for start, number, first, last in self.legs:
            done = min(max(moment - start, 0), last - first)
            steps += done
            seconds += done * train[number] + (done == last - first) * score[number]
        return steps, seconds, NUM_WORKERS * moment


Cost = tuple[int, float, int]
MEASURES = ("steps trained", "CPU seconds trained and scored", "steps of workers, idle or not")
Simulate = Callable[[ExperimentConfig, NDArray[np.float64], dict[int, int]], Played]


def play_halving(
    experiment: ExperimentConfig, scores: NDArray[np.float64], place: dict[int, int]
) -> Played:
    """Our rule: trials of `scores` [trials, budgets] in order, paused and promoted."""
    rule, played, queue, now = Rule.of(experiment), Played(), [], 0
    states = played.states
    while True:
        action = decide(states.values(), rule)
        if action.kind == "end":
            played.time = now
            return played
        if action.kind == "wait":
            now, _, trial_id = heapq.heappop(queue)
            state = states[trial_id]
            rung = rule.target(state)
            state.scored[rung] = {METRIC: float(scores[state.number, place[rung]])}
            if rung == rule.rungs[-1]:
                state.ended = "finished"
            continue
        if action.kind == "start":
            state = TrialState(f"t{len(states):04d}", len(states), {})
            states[state.trial_id] = state
        else:
            state = states[action.trial_id]
            state.promoted_to = action.step
        first, last = max(state.scored, default=0), rule.target(state)
        played.legs.append((now, state.number, first, last))
        heapq.heappush(queue, (now + last - first, state.number, state.trial_id))


class Trial:
    """A trial as far as Ray's stopping rules look at it."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"t{number:04d}"
        self.number = number
        self.config = {"trial_id": self.trial_id}


def play_stopping(
    experiment: ExperimentConfig, scores: NDArray[np.float64], place: dict[int, int]
) -> Played:
    """A rule of Ray's that stops trials: it sees every rung's result in the order of time."""
    scheduler, played = build_scheduler(experiment, {}), Played()
    controller: Any = None
    rungs, total = experiment.rungs, experiment.sweep.num_trials
    queue: list[tuple[int, int, int, Trial]] = []

    def begin(now: int) -> None:
        number = len(played.states)
        if number < total:
            trial: Any = Trial(number)
            played.states[trial.trial_id] = TrialState(trial.trial_id, number, {})
            scheduler.on_trial_add(controller, trial)
            played.legs.append((now, number, 0, rungs[0]))
            heapq.heappush(queue, (now + rungs[0], number, 0, trial))

    for _ in range(NUM_WORKERS):
        begin(0)
    while queue:
        now, number, rung, trial = heapq.heappop(queue)
        played.time = now
        value = float(scores[number, place[rungs[rung]]])
        played.states[trial.trial_id].scored[rungs[rung]] = {METRIC: value}
        result = {"step": rungs[rung], METRIC: value}
        told: Any = trial
        decision = scheduler.on_trial_result(controller, told, result)
        if rung + 1 == len(rungs) or decision == TrialScheduler.STOP:
            scheduler.on_trial_complete(controller, told, result)
            begin(now)
            continue
        first, last = rungs[rung], rungs[rung + 1]
        played.legs.append((now, number, first, last))
        heapq.heappush(queue, (now + last - first, number, rung + 1, trial))
    return played


Contestant = tuple[Simulate, dict[str, Any], int | None]
"""How it is played, its section, and `evaluation.every` where it compares on a grid."""


def contestants() -> dict[str, Contestant]:
    """All by name."""
    found: dict[str, Contestant] = {}
    for eta, grace in LADDERS:
        rungs = {"grace_period": grace, "reduction_factor": eta}
        for name, least in PATIENCE.items():
            section = {"type": "halving", "min_results": least, **rungs}
            found[f"halving {eta}/{grace} {name}"] = (play_halving, section, None)
        found[f"Ray asha {eta}/{grace}"] = (play_stopping, {"type": "asha", **rungs}, None)
    found["Ray median"] = (play_stopping, {"type": "median", "grace_period": 24}, 24)
    found["none"] = (play_stopping, {"type": "fifo"}, None)
    return found


def experiment_of(
    steps: int, section: dict[str, Any], every: int | None, trials: int
) -> ExperimentConfig:
    """An experiment whose scheduler is to be played."""
    plain = {
        "name": "schedulers",
        "data": {"sources": [{"type": "messages", "path": "none"}]},
        "train": {"max_steps": steps, "warmup_steps": 0},
        "evaluation": {"metrics": [METRIC], "every": every},
        "sweep": {"num_trials": trials, "num_executors": NUM_WORKERS, "scheduler": section},
    }
    return ExperimentConfig.model_validate(plain)


def play(contestant: Contestant, scores: NDArray[np.float64], table: Table, trials: int) -> Played:
    """A sweep of so many trials."""
    simulate, section, every = contestant
    place = {step: number for number, step in enumerate(table.budgets)}
    return simulate(experiment_of(table.budgets[-1], section, every, trials), scores, place)


def best_within(
    contestant: Contestant, scores: NDArray[np.float64], table: Table, budget: int
) -> Played:
    """The sweep of as many trials as fit into a budget of steps."""
    low, high = 1, min(len(scores), budget // table.budgets[0])
    fitting: Played | None = None
    while low <= high:
        middle = (low + high) // 2
        played = play(contestant, scores, table, middle)
        if played.steps <= budget:
            fitting, low = played, middle + 1
        else:
            high = middle - 1
    assert fitting is not None, "the budget is less than one trial"
    return fitting


def regrets(table: Table, budget: int, seeds: int, samples: int | None) -> dict[str, Any]:
    """Contestant -> [seeds, 3]: regret, trials, share of the workers' time that they were idle."""
    entries = contestants()
    found = {name: [] for name in entries}
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(table.true))
        scores = table.observed(draw, samples)[order]
        for name, contestant in entries.items():
            played = best_within(contestant, scores, table, budget * table.budgets[-1])
            regret = table.true.max() - table.true[order[played.chosen()]]
            idle = 1 - played.steps / (NUM_WORKERS * played.time)
            found[name].append((regret, len(played.states), idle))
    return {name: np.array(rows) for name, rows in found.items()}


def costs(
    table: Table, trials: int, within: float, to_end: bool, seeds: int, samples: int | None
) -> dict[str, NDArray[np.float64]]:
    """Contestant -> [seeds, 4]: whether a good winner was found, and the `Cost`."""
    entries = contestants()
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in entries}
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(table.true))
        scores = table.observed(draw, samples)[order]
        good = (table.true >= table.true.max() - within)[order]
        train, score = table.train_seconds[order], table.score_seconds[order]
        for name, contestant in entries.items():
            played = play(contestant, scores, table, trials)
            winners = played.winners(table.budgets[-1], scores)
            there = [moment for moment, number in winners if good[number]]
            moment = played.time if to_end or not there else there[0]
            is_found = good[winners[-1][1]] if to_end else bool(there)
            found[name].append((is_found, *played.cost(moment, train, score)))
    return {name: np.array(rows, dtype=float) for name, rows in found.items()}


def interval(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda drawn: drawn.mean(1),
) -> tuple[float, float]:
    """Bootstrap interval (95 %) over the first axis of a statistic of [draws, values, ...]."""
    draw = np.random.default_rng(0)
    drawn = values[draw.integers(0, len(values), (4000, len(values)))]
    low, high = np.quantile(statistic(drawn), (0.025, 0.975))
    return float(low), float(high)


def ratio(own: NDArray[np.float64], rival: NDArray[np.float64]) -> str:
    """Expected cost over the rival's, with an interval; both are [seeds, 2]: found, cost."""

    def of(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        found, cost, other_found, other_cost = drawn.sum(1).T
        return np.asarray(cost * other_found / (other_cost * found))

    pairs = np.hstack([own, rival])
    low, high = interval(pairs, of)
    return f"{of(pairs[None])[0]:.2f} [{low:.2f}, {high:.2f}]"


def tell_costs(found: dict[str, NDArray[np.float64]]) -> None:
    """Print a table for each measure of the cost."""
    for place, measure in enumerate(MEASURES, start=1):
        click.echo(f" {measure}: found, median, expected; over Ray asha's; over none's")
        for name, rows in found.items():
            own = rows[:, (0, place)]
            ends = np.where(own[:, 0] == 1, own[:, 1], np.inf)
            expected = own[:, 1].sum() / own[:, 0].sum()
            line = f"  {name:22} {own[:, 0].mean():4.0%} {np.median(ends):6.0f} {expected:6.0f}"
            rivals = [f"Ray asha {name.split()[1]}"] if name.startswith("halving") else []
            rivals += [] if name == "none" else ["none"]
            ratios = [ratio(own, found[rival][:, (0, place)]) for rival in rivals]
            click.echo("  ".join([line, *ratios]))


@click.command()
@click.option("--curves", type=click.Path(path_type=Path, exists=True), default=CURVES)
@click.option("--seeds", default=100, show_default=True, help="Random orders of the recipes.")
@click.option("--samples", type=int, help="Samples of a score at a rung; all if not given.")
@click.option("--budgets", multiple=True, type=int, default=BUDGETS, help="In complete trials.")
@click.option("--against", default="Ray asha 2/9", help="Paired differences of the others to this.")
@click.option(
    "--within", multiple=True, type=float, help="Print costs of a winner so good instead."
)
@click.option("--trials", default=32, show_default=True, help="With --within: recipes of a sweep.")
@click.option("--to-end", is_flag=True, help="With --within: of whole sweeps.")
def main(
    curves: Path,
    seeds: int,
    samples: int | None,
    budgets: tuple[int, ...],
    against: str,
    within: tuple[float, ...],
    trials: int,
    to_end: bool,
) -> None:
    """Print mean regrets, and paired differences with intervals, at every budget; or costs."""
    table = Table.read(curves, METRIC)
    click.echo(
        f"{len(table.true)} curves, {METRIC}, best {table.true.max():.3f}, median "
        f"{np.median(table.true):.3f}, {seeds} seeds, samples {samples or table.sums.shape[2]}"
    )
    for limit in within:
        number = (table.true >= table.true.max() - limit).sum()
        click.echo(f"{trials} recipes, a winner within {limit:g} of the best ({number} are)")
        tell_costs(costs(table, trials, limit, to_end, seeds, samples))
    for budget in () if within else budgets:
        found = regrets(table, budget, seeds, samples)
        click.echo(f"budget of {budget} complete trials: regret, trials, idle, less Ray asha's")
        for name, rows in found.items():
            regret, trials, idle = rows.mean(0)
            line = f"  {name:22} {regret:.4f} {trials:5.1f} {idle:4.0%}"
            rival = f"Ray asha {name.split()[1]}" if name.startswith("halving") else against
            difference = rows[:, 0] - found[rival][:, 0]
            low, high = interval(difference)
            click.echo(f"{line}  {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}] ({rival})")


if __name__ == "__main__":
    main()
