"""The table of a run of the plan, in the page that tells people of it."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from tests.faults.verdict import Verdict

BEGIN, END = "<!-- python -m tests.faults --write: begin -->", "<!-- end -->"
BAD = "NOT AS PROMISED"
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


def write(file: Path, verdicts: list[Verdict], order: list[str]) -> None:
    """Put rows between the marks of a page: in the place of those of the same faults.

    `order`: the names of all rows that there can be.
    """
    page = file.read_text()
    before, _, rest = page.partition(BEGIN)
    between, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{file} has no {BEGIN} ... {END}")
    cells = [line.strip("| ").split(" | ") for line in between.splitlines() if line[:1] == "|"]
    rows = {row[0]: row for row in cells[2:] if row[0] in order}
    rows |= {verdict.fault: row(verdict) for verdict in verdicts}
    listed = [rows[name] for name in order if name in rows]
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *listed)]
    left_out = [name for name in order if name not in rows]
    wrong = sum(BAD in row[2] for row in listed)
    said = (
        f"{len(listed)} rows, {wrong} not as promised; {date.today()}, {os.cpu_count()} shared CPU"
    )
    said += " cores, VM." + (f" Not run: {', '.join(left_out)}." if left_out else "")
    text = "\n".join([BEGIN, said, "", *lines, END])
    file.write_text(before + text + after)


def row(verdict: Verdict) -> list[str]:
    """The cells of a verdict; its problems stand where it says how the run ended."""
    name, where, ended, *others = verdict.cells()
    return [name, where, "; ".join([ended, *(f"{BAD}: {x}" for x in verdict.problems)]), *others]
