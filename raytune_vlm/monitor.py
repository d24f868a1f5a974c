"""What a person sees while a sweep runs: one line a stage, live bars on a terminal.

On a terminal the bars are rich's; in a log file (CI, `ray job logs`) a plain line appears when
something happened and at least every ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from raytune_vlm.visible import visible

Say = Callable[[str], None]
"""Tells a person something, in one line."""

LOG_WIDTH = 160
"""Columns of a table in a log file."""

QUIET_S = 10.0
"""Longest silence in a log file."""


def duration(seconds: float) -> str:
    """`95` -> `1:35`, `4000` -> `1:06:40`."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class Monitor:
    """The console of one run; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self._began = time.monotonic()
        self._spoke = 0.0
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, int]] = {}
        """When a stage was first heard of, and how far it was then."""

    def __enter__(self) -> Monitor:
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def say(self, message: str) -> None:
        """One line, with the time since the start.

        What follows a line break is indented: no message can look like a line of its own.
        """
        self._spoke = time.monotonic()
        text = visible(message).replace("\n", "\n    ")
        self.console.print(f"[{duration(time.monotonic() - self._began)}] {text}", markup=False)

    def progress(self, name: str, done: int, total: int, detail: str = "") -> None:
        """Where a stage stands; on a terminal a bar, in a log a line every ten seconds.

        Both say how long the rest will take at the pace so far.
        """
        left = self._time_left(name, done, total)
        detail = f"{detail} {left}".strip()
        if self._bars is None:
            if time.monotonic() - self._spoke >= QUIET_S:
                self.say(f"{name}: {done}/{total} {detail}".rstrip())
            return
        detail = visible(detail)
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(visible(name), total=total, detail=detail)
        self._bars.update(self._tasks[name], completed=done, total=total, detail=detail)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(name))

    def _time_left(self, name: str, done: int, total: int) -> str:
        began, before = self._first.setdefault(name, (time.monotonic(), done))
        if done >= total:
            del self._first[name]
        if done <= before or done >= total:
            return ""
        pace = (time.monotonic() - began) / (done - before)
        return f"{duration(pace * (total - done))} left"

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table on the console."""
        table = Table(title=Text(visible(title), style="table.title"), title_justify="left")
        for place, column in enumerate(columns):
            table.add_column(
                Text(visible(column)), justify="left" if place == 0 else "right", overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        self.console.print(table)
