"""Every plot of the page as a PNG file, and the loss of every trial."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.report.canvas import Plot
from raytune_vlm.report.loading import SweepView
from raytune_vlm.report.sparklines import loss_plot


def write_images(view: SweepView, shown: dict[str, Any]) -> None:
    """Write `report/plots/<title>.png` for what the page shows, and `loss-<trial>.png`."""
    folder = view.folder.report / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for part, value in shown.items():
        if part == "view":
            continue
        for plot in _plots(value):
            _write(folder / f"{_slug(f'{part} {plot.title}')}.png", plot)
    for trial in view.trials:
        if loss := loss_plot(trial):
            _write(folder / f"loss-{_slug(trial.trial_id)}.png", loss)


def _write(file: Path, plot: Plot) -> None:
    """As a new file: in a foreign folder the old one may be a FIFO, or a link to somewhere else."""
    file.unlink(missing_ok=True)
    file.write_bytes(plot.png())


def _plots(value: Any) -> Iterator[Plot]:
    """The plots in a value of the page, however deep they are."""
    if isinstance(value, Plot):
        yield value
    elif isinstance(value, dict):
        yield from _plots(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _plots(entry)
    elif is_dataclass(value):
        yield from _plots([getattr(value, entry.name) for entry in fields(value)])


def _slug(text: str) -> str:
    """A file name of plain letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
