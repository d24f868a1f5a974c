"""The table of a run of the plan, in the page that tells people of it."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from tests.faults.verdict import Verdict

BEGIN, END = "<!-- python -m tests.faults --write: begin -->", "<!-- end -->"
COLUMNS = (
    "fault",
    "where it strikes",
    "the run",
    "winner",
    "metrics",
    "weights",
    "samples",
    "trials lost",
    "trials doubled",
    "steps repeated",
    "seconds to the next step",
)


def render(verdicts: list[Verdict], left_out: list[str], seed: int) -> str:
    """The table with what it was made of."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(verdict.cells() for verdict in verdicts)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    problems = [f"{verdict.fault}: {entry}" for verdict in verdicts for entry in verdict.problems]
    said = (
        f"`python -m tests.faults --seed {seed}`, {date.today()}, {os.cpu_count()} shared CPU "
        f"cores, VM: {len(verdicts)} rows, {len(problems)} not as promised."
    )
    if left_out:
        said += f" Not run for want of time: {', '.join(left_out)}."
    return "\n".join([said, "", *lines, *(f"- NOT AS PROMISED: {entry}" for entry in problems)])


def write(file: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    before, _, rest = file.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{file} has no {BEGIN} ... {END}")
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
