"""The three answers as text on a console. Data only comes in as `Text`, never as markup."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from raytune_vlm.config.data import DataConfig
from raytune_vlm.inspection.lengths import BATCH_SIZE, Histogram, Statistics, bars
from raytune_vlm.inspection.sample_view import ImageView, RefusedView, SampleView
from raytune_vlm.inspection.tally import Verdict
from raytune_vlm.inspection.target import Target
from raytune_vlm.inspection.text import TIMES, line, middle_out
from raytune_vlm.inspection.tokens import Piece
from raytune_vlm.monitor import LOG_WIDTH

MAX_CHARACTERS = 1600
"""A longer piece of text loses its middle on the console."""

OPEN, CLOSE = "⟦", "⟧"
"""Around labelled text where there are no colours."""


def make_console() -> Console:
    """The console of standard output; what it cannot write comes as an escape, not as an error."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def show_target(console: Console, target: Target) -> None:
    """How the files are read, and what is left out."""
    for way in target.read_as:
        console.print(Text(f"read as: {way}"), soft_wrap=True)
    for file in target.left_out[:8]:
        console.print(Text(f"left out: {file}", style="yellow"), soft_wrap=True)
    if len(target.left_out) > 8:
        console.print(Text(f"left out: {len(target.left_out) - 8} more files", style="yellow"))


def show_sample(console: Console, view: SampleView | RefusedView) -> None:
    """A sample with its images and its token stream, or why there is none."""
    console.print()
    title = Text(f"{view.number}  {view.origin}", style="bold")
    console.print(Rule(title, align="left", style="dim"))
    if isinstance(view, RefusedView):
        console.print(Text(f"cannot be used: {view.reason}", style="bold red"), soft_wrap=True)
        return
    split = "" if view.split == "auto" else f"  split {view.split}"
    ids = f"sample {view.sample_id}  group {view.group_id}{split}  {view.num_turns} turns"
    console.print(Text(ids, style="dim"), soft_wrap=True)
    for number, image in enumerate(view.images, 1):
        console.print(Text(f"image {number}: {image_line(image)}"), soft_wrap=True)
    console.print(Text(token_line(view)), soft_wrap=True)
    console.print(stream(view.pieces, colours=_has_colours(console)), soft_wrap=True)
    if view.is_prompt:
        reference = Text(middle_out(view.reference, 800))
        console.print(Text("reference: ", style="dim") + reference, soft_wrap=True)


def image_line(image: ImageView) -> str:
    """`PNG, 160 x 160 in the file (4.2 kB); the model gets 128 x 128, 64 tokens`, heights first."""
    pixels = f"{image.height} {TIMES} {image.width}"
    size = f"{image.format}, {pixels} in the file ({_bytes(image.num_bytes)})"
    if image.given is None:
        return size
    tokens = f", {image.given.num_tokens:,} tokens" if image.given.num_tokens is not None else ""
    return f"{size}; the model gets {image.given.size}{tokens}"


def token_line(view: SampleView) -> str:
    """The counts of a sample."""
    loss = "the model answers from here" if view.is_prompt else f"{view.num_labelled:,} carry loss"
    long = "; longer than data.max_length" if view.over_long else ""
    return f"{view.num_tokens:,} tokens: {view.num_image_tokens:,} of images, {loss}{long}"


def stream(pieces: tuple[Piece, ...], *, colours: bool) -> Text:
    """The token stream: labelled text green, or between brackets where there are no colours."""
    text = Text()
    labelled = False
    for piece in pieces:
        if piece.labelled != labelled and not colours:
            text.append(OPEN if piece.labelled else CLOSE)
        labelled = piece.labelled
        shown = middle_out(piece.text, MAX_CHARACTERS).replace("\n", "↵\n")
        text.append(shown, style=_style(piece))
    if labelled and not colours:
        text.append(CLOSE)
    text.rstrip()
    return text


def _style(piece: Piece) -> str:
    if piece.kind == "image":
        return "magenta"
    if piece.labelled:
        return "bold green" if piece.kind == "special" else "green"
    return "cyan dim" if piece.kind == "special" else "dim"


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _bytes(number: int) -> str:
    for limit, unit in ((1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number} bytes"


def show_statistics(console: Console, statistics: Statistics) -> None:
    """The figures, and the histogram of lengths."""
    console.print()
    for label, value in facts(statistics):
        console.print(Text(f"{label:<22}", style="dim") + Text(value), soft_wrap=True)
    if not statistics.spreads:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("min", "median", "mean", "95 %", "99 %", "max"):
        table.add_column(name, justify="right")
    for name, cells in spread_rows(statistics):
        table.add_row(Text(name), *cells)
    console.print()
    console.print(table)
    if statistics.histogram is not None:
        console.print()
        console.print(Text("samples by length in tokens", style="bold"))
        _show_histogram(console, statistics.histogram, statistics.max_length)


def facts(statistics: Statistics) -> list[tuple[str, str]]:
    """The figures that are one number or a short list: label and value."""
    seen, good = statistics.num_seen, statistics.num_good
    rows = [("rows", f"{seen:,} seen = {good:,} good + {statistics.num_bad:,} bad")]
    if set(statistics.splits) - {"auto"}:
        rows.append(("splits", _shares(statistics.splits)))
    if not good:
        return rows
    rows.append(("turns a sample", _shares(statistics.turns, " in {:,} samples")))
    rows.append(("images a sample", _shares(statistics.images_per_sample, " in {:,} samples")))
    rows.append(("text only", _share(statistics.num_text_only, good)))
    if statistics.num_images:
        rows.append(("image formats", _shares(statistics.formats)))
    rows.append(("tokens", f"{statistics.num_tokens:,}"))
    over = _share(statistics.num_over_long, good)
    rows.append(("over data.max_length", f"{over} longer than {statistics.max_length:,} tokens"))
    if statistics.padding_waste is not None:
        waste = f"{100 * statistics.padding_waste:.1f} % in random batches of {BATCH_SIZE}"
        rows.append(("padding", waste))
    if statistics.num_packed is not None:
        fitting = good - statistics.num_over_long
        packed = f"{fitting:,} samples in at least {statistics.num_packed:,} rows"
        rows.append(("packed", f"{packed} of {statistics.max_length:,} tokens"))
    return rows


def spread_rows(statistics: Statistics) -> list[tuple[str, list[str]]]:
    """Name and six cells for each measured quantity."""
    rows = []
    for name, entry in statistics.spreads.items():
        values = (entry.minimum, entry.median, entry.mean, entry.p95, entry.p99, entry.maximum)
        rows.append((name, [_number(value, name == "megapixels") for value in values]))
    return rows


def bin_labels(histogram: Histogram) -> list[str]:
    """`100-119` for each bin; the last one `200+` where it is open."""
    pairs = zip(histogram.edges, histogram.edges[1:], strict=False)
    labels = [
        f"{low:,.0f}-{high - 1:,.0f}" if high - low > 1 else f"{low:,.0f}" for low, high in pairs
    ]
    if histogram.open_end:
        labels[-1] = f"{histogram.edges[-2]:,.0f}+"
    return labels


def _show_histogram(console: Console, histogram: Histogram, max_length: int) -> None:
    labels = bin_labels(histogram)
    space = max(map(len, labels))
    drawn = bars(histogram.counts, 40)
    for label, bar, count, low in zip(
        labels, drawn, histogram.counts, histogram.edges, strict=False
    ):
        style = "red" if low >= max_length else "green"
        text = Text(f"{label:>{space}} ", style="dim") + Text(bar, style=style)
        console.print(text + Text(f" {count:,}" if count else " ", style="dim"), soft_wrap=True)


def _shares(counts: dict[int, int] | dict[str, int], form: str = " {:,}") -> str:
    shown = [f"{key}{form.format(count)}" for key, count in list(counts.items())[:8]]
    return ", ".join([*shown, *(["..."] if len(counts) > 8 else [])])


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.3g} %)" if count else "none"


def _number(value: float, fine: bool) -> str:
    if fine:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:,.1f}"


def show_verdict(console: Console, verdict: Verdict, settings: DataConfig) -> None:
    """The account of all rows."""
    console.print()
    seen = f"seen {verdict.num_seen:,} = good {verdict.num_good:,} + bad {verdict.num_bad:,}"
    share = f" ({100 * verdict.bad_fraction:.3g} %)" if verdict.num_bad else ""
    style = "bold red" if verdict.num_bad or not verdict.num_seen else "bold green"
    console.print(Text(seen + share, style=style))
    if verdict.num_over_long:
        long = f"{verdict.num_over_long:,} of the good ones are longer than data.max_length"
        said = f"={settings.max_length} tokens (data.over_long: {settings.over_long})"
        console.print(Text(long + said), soft_wrap=True)
    if verdict.reasons:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("count", justify="right")
        table.add_column("reason (as the first row has it)", overflow="fold")
        table.add_column("first", overflow="fold")
        for reason in verdict.reasons:
            cells = (Text(line(reason.text)), Text(line(reason.origin)))
            table.add_row(f"{reason.count:,}", *cells)
        console.print(table)
        if verdict.num_reasons > len(verdict.reasons):
            console.print(f"and {verdict.num_reasons - len(verdict.reasons):,} more reasons")
    console.print(Text(f"exact duplicates: {verdict.num_duplicates or 'none'}"))
    for origin, first in verdict.duplicates:
        console.print(Text(f"  {line(origin)} repeats {line(first)}"), soft_wrap=True)
    if verdict.named_splits:
        pairs = [f"{count:,} in {pair}" for pair, count in verdict.shared_groups.items()]
        shown = Text(f"groups in two splits: {', '.join(pairs) or 'none'}")
        shown.stylize("red" if pairs else "")
        console.print(shown)
