"""`raytune-vlm data ...`: what is in a folder of image-text data, before anything is trained.

raytune-vlm data {inspect|stats|validate} TARGET [dotted.key=value ...]
raytune-vlm data export TARGET [dotted.key=value ...] --format trl --output DIR

`label` and `agree` stand in `cli_label.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raytune_vlm.cli_label import agree, label
from raytune_vlm.errors import ConfigError, DataError
from raytune_vlm.visible import tell

if TYPE_CHECKING:
    from raytune_vlm.collate.encode import Encoder
    from raytune_vlm.inspection.rows import Row
    from raytune_vlm.inspection.target import Target

_Command = TypeVar("_Command", bound=Callable[..., Any])

TRUST = click.option(
    "--trust-remote-code",
    "trust",
    metavar="MODEL@REVISION",
    help="Let the code that comes with a model run; without this option no such code does.",
)
"""Of every command that loads a model; see `models/trust.py`."""

STATUS_BAD_ROWS = 1
"""Exit status of `validate` where more rows are bad than may be."""


@click.group()
def data() -> None:
    """See what is in image-text data, and what a model will see of it.

    A TARGET is an EXPERIMENT.yaml, or a data file, a folder or a quoted glob, whose source type is
    detected. Keys can be overridden: data.max_length=4096, data.sources.0.text_column=caption.
    """


data.add_command(label)
data.add_command(agree)


def _shared(command: _Command) -> _Command:
    """What all three commands take."""
    for decorate in (
        TRUST,
        click.option("--model", help="`demo`, a folder or a hub name. [default: demo]"),
        click.option("--type", "type_name", help="Source type, where it is not to be detected."),
        click.argument("overrides", nargs=-1),
        click.argument("target"),
    ):
        command = decorate(command)
    return command


_LIMIT = click.IntRange(min=1)
_HTML = click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page."
)


@data.command()
@_shared
@click.option("--limit", type=_LIMIT, default=3, show_default=True, help="So many rows.")
@_HTML
def inspect(
    target: str,
    overrides: tuple[str, ...],
    type_name: str | None,
    model: str | None,
    trust: str | None,
    limit: int,
    html: Path | None,
) -> None:
    """Show the first samples as the model will see them.

    Labelled tokens, which carry loss, are green; without colours they stand between ⟦ and ⟧.
    Sizes are height by width.
    """
    from raytune_vlm.inspection import terminal
    from raytune_vlm.inspection.page import write_inspection
    from raytune_vlm.inspection.rows import open_encoder, read_rows
    from raytune_vlm.inspection.sample_view import view_of

    _check_folder(html)
    resolved = _resolve(target, overrides, type_name, model, trust)
    console = terminal.make_console()
    terminal.show_target(console, resolved)
    experiment = resolved.experiment
    encoder = open_encoder(experiment.model)
    views = []
    rows = read_rows(experiment, encoder, lambda done, total: None)
    for number, row in enumerate(islice(rows, limit), 1):
        view = view_of(
            row,
            number,
            encoder,
            max_length=experiment.data.max_length,
            limits=experiment.data.image_limits,
            pictures=html is not None,
        )
        terminal.show_sample(console, view)
        views.append(view)
    _refuse_nothing(target, len(views))
    if html is not None:
        write_inspection(html, resolved, views)
        click.echo(f"page: {html}")


@data.command()
@_shared
@click.option("--limit", type=_LIMIT, help="Only the first so many rows.")
@_HTML
def stats(
    target: str,
    overrides: tuple[str, ...],
    type_name: str | None,
    model: str | None,
    trust: str | None,
    limit: int | None,
    html: Path | None,
) -> None:
    """Count turns, images and tokens of all samples."""
    from raytune_vlm.inspection import terminal
    from raytune_vlm.inspection.lengths import Measures
    from raytune_vlm.inspection.page import write_statistics
    from raytune_vlm.inspection.rows import open_encoder

    _check_folder(html)
    resolved = _resolve(target, overrides, type_name, model, trust)
    console = terminal.make_console()
    terminal.show_target(console, resolved)
    encoder = open_encoder(resolved.experiment.model, sizes_only=True)
    measures = Measures(resolved.experiment.data.max_length)
    for row in _all_rows(resolved, encoder, limit):
        measures.add(row, encoder.processor)
    statistics = measures.statistics()
    _refuse_nothing(target, statistics.num_seen)
    terminal.show_statistics(console, statistics)
    if html is not None:
        write_statistics(html, resolved, statistics)
        click.echo(f"page: {html}")


@data.command()
@_shared
@click.option("--limit", type=_LIMIT, help="Only the first so many rows.")
@click.option(
    "--no-tokens", is_flag=True, help="Decode images, but do not ask the model's encoder."
)
@click.option(
    "--max-bad-fraction",
    type=click.FloatRange(0, 1),
    help="Share of rows that may be bad. [default: data.max_bad_fraction, which is 0]",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write every bad row to a JSON lines file.",
)
def validate(
    target: str,
    overrides: tuple[str, ...],
    type_name: str | None,
    model: str | None,
    trust: str | None,
    limit: int | None,
    no_tokens: bool,
    max_bad_fraction: float | None,
    output: Path | None,
) -> None:
    """Read, decode and encode every row, and say which cannot be used and why.

    The exit status is 0 where no more rows are bad than may be, 1 where more are, 2 for wrong use.
    """
    from raytune_vlm.inspection import terminal
    from raytune_vlm.inspection.rows import open_encoder
    from raytune_vlm.inspection.tally import Tally

    _check_folder(output)
    resolved = _resolve(target, overrides, type_name, model, trust)
    console = terminal.make_console()
    terminal.show_target(console, resolved)
    settings = resolved.experiment.data
    encoder = None if no_tokens else open_encoder(resolved.experiment.model, sizes_only=True)
    tally = Tally(settings.max_length)
    with ExitStack() as stack:
        stream = None
        if output is not None:
            stream = stack.enter_context(output.open("w", encoding="utf-8"))
        for row in _all_rows(resolved, encoder, limit, tally):
            bad = tally.add(row)
            if bad is not None and stream is not None:
                stream.write(json.dumps(asdict(bad)) + "\n")
    verdict = tally.verdict()
    _refuse_nothing(target, verdict.num_seen)
    terminal.show_verdict(console, verdict, settings)
    if output is not None:
        click.echo(f"bad rows: {output}")
    allowed = settings.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
    if verdict.bad_fraction > allowed:
        sys.exit(STATUS_BAD_ROWS)


EXPORT_FORMATS = ("llamafactory", "trl", "ms_swift", "automodel")
"""The names of `exchange.formats.FORMATS`, which is not imported to show a help text."""


@data.command()
@click.option("--type", "type_name", help="Source type, where it is not to be detected.")
@click.option("--format", "form", type=click.Choice(EXPORT_FORMATS), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.argument("target")
@click.argument("overrides", nargs=-1)
def export(
    target: str, overrides: tuple[str, ...], type_name: str | None, form: str, output: Path
) -> None:
    """Write the samples of train, select and report for another trainer, and say how it reads them.

    Pictures are copied as they are. Bad rows are left out as `prepare` leaves them out.
    """
    from raytune_vlm.exchange.formats import FORMATS
    from raytune_vlm.exchange.writer import write_samples
    from raytune_vlm.inspection import terminal
    from raytune_vlm.records import SPLITS, by_kind

    resolved = _resolve(target, overrides, type_name, None, None)
    terminal.show_target(terminal.make_console(), resolved)
    experiment, chosen = resolved.experiment, FORMATS[form]
    written = write_samples(experiment, _all_rows(resolved, None, None), form, output)
    for first, count in by_kind(written.quarantine):
        more = f" (and {count - 1} more)" if count > 1 else ""
        tell(f"left out: {first.origin}: {first.reason}{more}")
    if written.num_copies:
        tell(f"left out: {written.num_copies} copies in train (data.deduplicate)")
    if written.num_joined:
        tell(f"{written.num_joined} samples: neighbouring texts of a turn are one text now")
    if any(source.weight is not None for source in experiment.data.sources):
        tell("the weights of the sources are not part of the files: every sample stands once")
    for split in SPLITS:
        if count := written.rows[split]:
            tell(f"{split}: {count} samples")
            names = {"folder": output.resolve(), "split": split}
            tell(f"  {chosen.peer}: {chosen.load.format(**names)}")
            keys = {key: value.format(**names) for key, value in chosen.source.items()}
            listed = ", ".join(f"{key}: {value}" for key, value in keys.items())
            tell(f"  raytune-vlm, with data.root={output}: {{{listed}, split: {split}}}")


def _resolve(
    target: str,
    overrides: tuple[str, ...],
    type_name: str | None,
    model: str | None,
    trust: str | None,
) -> Target:
    from raytune_vlm.inspection.target import resolve_target
    from raytune_vlm.models.trust import with_trust

    resolved = resolve_target(target, overrides, type_name=type_name, model=model)
    return replace(resolved, experiment=with_trust(resolved.experiment, trust))


def _all_rows(
    target: Target, encoder: Encoder | None, limit: int | None, tally: Any = None
) -> Iterator[Row]:
    """The rows, with a bar or a line every ten seconds on standard error while they are read."""
    from rich.console import Console

    from raytune_vlm.inspection.rows import read_rows
    from raytune_vlm.monitor import Monitor

    count = 0
    with Monitor(Console(stderr=True, highlight=False, soft_wrap=True)) as monitor:

        def progress(done: int, total: int) -> None:
            bad = f", {tally.num_bad:,} bad" if tally is not None else ""
            monitor.progress("shards read", done, total, f"{count:,} rows{bad}")

        for row in islice(read_rows(target.experiment, encoder, progress), limit):
            count += 1
            yield row


def _check_folder(file: Path | None) -> None:
    """Raise ConfigError now rather than after an hour where a file cannot be written."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.absolute().parent}")


def _refuse_nothing(target: str, num_rows: int) -> None:
    from raytune_vlm.inspection.text import line

    if num_rows == 0:
        raise DataError(f"{line(target)}: there is no row to read")
