"""Writes the Grafana dashboards: `python deploy/dashboards.py` (needs grafana-foundation-sdk).

Each expression is aggregated, since Ray puts labels of its own on every series (process, node,
session). `ray_raytune_vlm_*` are the gauges of `raytune_vlm/sweep/gauges.py` and the numbers of a
line of `metrics.jsonl`; the others are Ray's. `tests/test_dashboards.py` holds the names against
those tables, `benchmarks/dashboards_live.py` asks a Prometheus that scraped a sweep for each.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as c
from grafana_foundation_sdk.models import dashboard as d
from grafana_foundation_sdk.models import units

OUTPUT = Path(__file__).parent / "grafana" / "dashboards"
SOURCE = d.DataSourceRef(type_val="prometheus", uid="raytune-vlm-prometheus")
"""The data source that `provisioning/datasources` makes."""

OURS = "ray_raytune_vlm_"
SWEEP = 'sweep=~"$sweep"'

GREEN, ORANGE, RED = "green", "orange", "red"
Steps = tuple[tuple[float | None, str], ...]


@dataclass(frozen=True)
class Panel:
    """One panel: what it shows and how."""

    title: str
    queries: tuple[tuple[str, str], ...]
    """Expression and legend."""
    unit: str = units.Short
    kind: str = "lines"
    """`lines`, `number` or `bars`."""
    width: int = 12
    height: int = 8
    steps: Steps = ((None, GREEN),)
    """From which value on which colour."""
    limits: tuple[float | None, float | None] = (None, None)
    decimals: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels."""

    name: str
    title: str
    rows: dict[str, tuple[Panel, ...]] = field(default_factory=dict)


def sweep(name: str, by: str = "", labels: str = "", how: str = "max") -> str:
    """A gauge of the selected sweeps, over what Ray adds."""
    inside = ", ".join(filter(None, [SWEEP, labels]))
    return f"{how} by ({by or 'sweep'}) ({OURS}{name}{{{inside}}})"


def number(title: str, expr: str, unit: str = units.Short, **more: Any) -> Panel:
    """One large number."""
    return Panel(title, ((expr, ""),), unit, "number", more.pop("width", 4), 4, **more)


def trial_lines(title: str, name: str, unit: str = units.Short, **more: Any) -> Panel:
    """A number of the step, a line a trial."""
    expr = sweep(name, "trial_id")
    return Panel(title, ((expr, "{{trial_id}}"),), unit, **more)


SWEEPS = Board(
    "sweep",
    "raytune_vlm: sweep",
    {
        "Where it stands": (
            number("Progress", sweep("progress"), units.PercentUnit, limits=(0, 1), decimals=0),
            number("Time left", sweep("seconds_left"), units.Seconds),
            number("Held so far", sweep("held_seconds"), units.Seconds),
            number("Cost so far", sweep("cost"), decimals=2,
                   text="At sweep.cost_per_gpu_hour and cost_per_cpu_hour; 0 without a price."),
            number("Cost left", sweep("cost_left"), decimals=2),
            number("Budget used", sweep("budget_used", "limit"), units.PercentUnit, decimals=1,
                   steps=((None, GREEN), (0.75, ORANGE), (0.9, RED)),
                   text="Share of each sweep.max_* that is set."),
            Panel("Trials by state", ((sweep("trials", "state"), "{{state}}"),), kind="bars",
                  width=12, decimals=0),
            Panel("Trials scored at each rung", ((sweep("rung_trials", "step"), "step {{step}}"),),
                  kind="bars", width=12, decimals=0),
        ),
        "Scores on select": (
            Panel(
                "Best score with its interval",
                (
                    (sweep("best_score", "metric", 'metric=~"$metric"'), "{{metric}}"),
                    (sweep("best_score_lower", "metric", 'metric=~"$metric"'), "{{metric}} lower"),
                    (sweep("best_score_upper", "metric", 'metric=~"$metric"'), "{{metric}} upper"),
                    (sweep("base_score", "metric", 'metric=~"$metric"'), "{{metric}} base model"),
                ),
                text="Flattered by having been picked: the report has it corrected.",
            ),
            Panel("Score of each trial",
                  ((sweep("trial_score", "trial_id, metric", 'metric=~"$metric"'),
                    "{{trial_id}} {{metric}}"),)),
        ),
        "Executors": (
            Panel("Slots", ((sweep("slots_in_use"), "in use"), (sweep("executors_alive"), "alive"),
                            (sweep("trials_queued"), "trials waiting")), width=8, decimals=0),
            Panel("Faults and recoveries",
                  ((sweep("recoveries"), "jobs handed out again"),
                   (sweep("resumes"), "resumes"),
                   (sweep("trials", "state", 'state=~"failed|infeasible"'), "{{state}} trials")),
                  width=8, decimals=0),
            Panel("Trials ended", ((sweep("trials_ended"), "in this life of the sweep"),
                                   (sweep("trials_planned"), "planned")), width=8, decimals=0),
        ),
    },
)  # fmt: skip

TRAINING = Board(
    "training",
    "raytune_vlm: training",
    {
        "Learning": (
            trial_lines("Loss", "loss", text="Cross-entropy per labelled token, in nats."),
            trial_lines("Gradient norm", "grad_norm", text="Before clipping."),
            trial_lines("Learning rate", "learning_rate", units.SiShort),
            trial_lines("Steps without an update", "skipped_steps", decimals=0,
                        steps=((None, GREEN), (1, RED))),
            trial_lines("Step", "step", decimals=0),
            trial_lines("Rows of a forward pass", "micro_batch_size", decimals=0,
                        text="Falls after an out-of-memory."),
        ),
        "Speed": (
            trial_lines("Samples a second", "samples_per_second", width=8),
            trial_lines("Tokens a second", "tokens_per_second", width=8,
                        text="Padding not counted."),
            trial_lines("Images a second", "images_per_second", width=8),
            trial_lines("Seconds a step", "seconds", units.Seconds),
            Panel("All trials together",
                  ((f"sum({sweep('tokens_per_second', 'trial_id')})", "tokens a second"),
                   (f"sum({sweep('samples_per_second', 'trial_id')})", "samples a second"))),
        ),
        "Devices": (
            trial_lines("Peak memory", "peak_memory_bytes", units.BytesSI,
                        text="Of rank 0: its GPU's, or the process's on CPU."),
            Panel("CPU of the nodes",
                  (("avg by (ip) (ray_node_cpu_utilization) / 100", "{{ip}}"),),
                  units.PercentUnit, limits=(0, 1)),
            trial_lines("GPU: model FLOPs utilisation", "mfu", units.PercentUnit, width=8,
                        limits=(0, 1)),
            Panel("GPU: utilisation",
                  (("avg by (ip, GpuIndex) (ray_node_gpus_utilization) / 100",
                    "{{ip}} {{GpuIndex}}"),), units.PercentUnit, width=8, limits=(0, 1)),
            Panel("GPU: memory",
                  (("max by (ip, GpuIndex) (ray_node_gram_used) * 1048576",
                    "{{ip}} {{GpuIndex}}"),), units.BytesIEC, width=8),
        ),
    },
)  # fmt: skip

DATA = Board(
    "data",
    "raytune_vlm: data",
    {
        "On the way to the device": (
            trial_lines("Time spent waiting for data", "data_wait_share", units.PercentUnit,
                        limits=(0, 1), steps=((None, GREEN), (0.1, ORANGE), (0.2, RED))),
            trial_lines("Padding", "padding_share", units.PercentUnit, limits=(0, 1),
                        text="Share of the tokens fed that belong to no sample."),
            trial_lines("Labelled tokens", "labelled_share", units.PercentUnit, limits=(0, 1)),
            Panel("Tokens of a global batch",
                  ((sweep("tokens", "trial_id"), "{{trial_id}}"),
                   (sweep("fed_tokens", "trial_id"), "{{trial_id}} fed"))),
        ),
        "What was prepared": (
            Panel("Samples", ((sweep("split_samples", "split, fate"), "{{split}} {{fate}}"),),
                  kind="bars", width=8, decimals=0),
            Panel("Quarantined, by reason",
                  ((sweep("quarantined_samples", "reason"), "{{reason}}"),), kind="bars", width=8,
                  decimals=0, steps=((None, ORANGE),),
                  text="All of them, with file and row, are in data/quarantine.jsonl."),
            Panel("Length in tokens",
                  ((sweep("sample_tokens_mean", "split"), "{{split}} mean"),
                   (sweep("sample_tokens_max", "split"), "{{split}} longest")), kind="bars",
                  width=8, decimals=0),
        ),
        "Nodes": (
            Panel("Memory", (("max by (ip) (ray_node_mem_used)", "{{ip}}"),), units.BytesIEC,
                  width=8),
            Panel("Object store",
                  (("sum by (Location) (ray_object_store_memory)", "{{Location}}"),),
                  units.BytesIEC, width=8),
            Panel("Disk free", (("min by (ip) (ray_node_disk_free)", "{{ip}}"),), units.BytesIEC,
                  width=8),
        ),
    },
)  # fmt: skip

EVALUATION = Board(
    "evaluation",
    "raytune_vlm: evaluation",
    {
        "Running": (
            Panel("Prompts answered",
                  ((f"{sweep('prompts_answered', 'executor, trial_id')} / "
                    f"{sweep('prompts_asked', 'executor, trial_id')}",
                    "{{executor}} {{trial_id}}"),), units.PercentUnit, limits=(0, 1)),
            Panel("Time left",
                  ((sweep("evaluation_seconds_left", "executor, trial_id"),
                    "{{executor}} {{trial_id}}"),), units.Seconds),
        ),
        "Scored": (
            Panel("Score of each trial",
                  ((sweep("trial_score", "trial_id, metric", 'metric=~"$metric"'),
                    "{{trial_id}} {{metric}}"),), kind="bars"),
            Panel("Where each trial was scored last",
                  ((sweep("trial_step", "trial_id"), "{{trial_id}}"),), kind="bars", decimals=0),
            Panel("Answers that are unparsed, empty or truncated",
                  ((sweep("trial_bad_answers", "trial_id, fault"), "{{trial_id}} {{fault}}"),),
                  units.PercentUnit, limits=(0, 1), width=24,
                  steps=((None, GREEN), (0.05, ORANGE), (0.2, RED))),
        ),
    },
)  # fmt: skip

BOARDS = (SWEEPS, TRAINING, DATA, EVALUATION)


def build(board: Board) -> str:
    """A dashboard as JSON."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"raytune-vlm-{board.name}")
        .tags(["raytune_vlm"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(d.DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("raytune_vlm").type("dashboards").tags(["raytune_vlm"])
              .as_dropdown(False).include_vars(True).keep_time(True))
        .with_variable(_variable("sweep", f"label_values({OURS}trials_planned, sweep)"))
    )  # fmt: skip
    if any("$metric" in expr for row in board.rows.values() for p in row for expr, _ in p.queries):
        made = made.with_variable(_variable("metric", f"label_values({OURS}best_score, metric)"))
    number = 0
    for title, panels in board.rows.items():
        number += 1
        made = made.with_row(dashboard.Row(title).id(number))
        for panel in panels:
            number += 1
            made = made.with_panel(_panel(panel).id(number))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _variable(name: str, query: str) -> Any:
    return (
        dashboard.QueryVariable(name)
        .query(query)
        .datasource(SOURCE)
        .refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(d.VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .all_value(".*")
        .multi(True)
    )


def _panel(panel: Panel) -> Any:
    kinds: dict[str, Any] = {
        "lines": timeseries.Panel,
        "number": stat.Panel,
        "bars": bargauge.Panel,
    }
    steps = [d.Threshold(value, color) for value, color in panel.steps]
    made = (
        kinds[panel.kind]()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .unit(panel.unit)
        .span(panel.width)
        .height(panel.height)
        .thresholds(dashboard.ThresholdsConfig().mode(d.ThresholdsMode.ABSOLUTE).steps(steps))
    )
    low, high = panel.limits
    made = made if low is None else made.min(low)
    made = made if high is None else made.max(high)
    made = made if panel.decimals is None else made.decimals(panel.decimals)
    if panel.kind == "lines":
        legend = (
            common.VizLegendOptions()
            .display_mode(c.LegendDisplayMode.TABLE)
            .placement(c.LegendPlacement.RIGHT)
            .show_legend(True)
            .calcs(["lastNotNull"])
        )
        made = made.legend(legend).line_width(2).show_points(c.VisibilityMode.NEVER)
    else:
        made = made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if panel.kind == "bars":
        made = made.orientation(c.VizOrientation.HORIZONTAL)
    for place, (expr, text) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expr).ref_id(chr(ord("A") + place))
        made = made.with_target(query.legend_format(text).range() if text else query.range())
    return made


def main(output: Path = OUTPUT) -> None:
    """Write them all."""
    output.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (output / f"{board.name}.json").write_text(build(board), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
