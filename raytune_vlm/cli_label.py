"""`raytune-vlm data label` and `data agree`: labels for images that have none.

raytune-vlm data label LABELS.yaml [--allow-host HOST] [dotted.key=value ...]
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raytune_vlm.visible import tell

if TYPE_CHECKING:
    from raytune_vlm.label.answers import Account
    from raytune_vlm.label.run import Tally

STATUS_UNANSWERED = 3
"""Exit status where a teacher gave no answer to some pages: the same command asks again."""


@click.command()
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="Another machine that pages may be sent to; without it they stay on this one.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many pages.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("overrides", nargs=-1)
def label(
    file: Path, overrides: tuple[str, ...], hosts: tuple[str, ...], limit: int | None
) -> None:
    """Let models behind OpenAI-compatible servers label images and pages.

    FILE names pages, tasks, teachers and a budget. Every reply is kept: run again, nothing is asked
    or paid for twice.
    """
    from rich.console import Console

    from raytune_vlm.config.label import load_labels
    from raytune_vlm.label.answers import AnswerLog
    from raytune_vlm.label.folder import LabelFolder
    from raytune_vlm.label.run import Labelling
    from raytune_vlm.monitor import Monitor

    config = load_labels(file, overrides, hosts)
    folder = LabelFolder(Path(config.output))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # replies under way are kept
    monitor = Monitor(Console(stderr=True, highlight=False, soft_wrap=True))

    def progress(done: int, total: int, detail: str) -> None:
        monitor.progress("files read", done, total, detail)

    with AnswerLog(folder.answers_file) as log:
        labelling = Labelling(config, folder, log, limit, progress)
        try:
            with monitor:
                labelling.run()
        finally:
            _summary(labelling.tally, log.account, folder.root)
    if labelling.tally.num_unanswered:
        tell(f"{labelling.tally.num_unanswered} answers did not come: run the same command again")
        sys.exit(STATUS_UNANSWERED)


@click.command()
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="A page is reviewed where a field agrees less than this.",
)
@click.option(
    "--reviewed",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Decisions to take over: the page's reviewed.jsonl, or an edited review.jsonl.",
)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("other", required=False, type=click.Path(file_okay=False, path_type=Path))
def agree(folder: Path, other: Path | None, threshold: float, reviewed: Path | None) -> None:
    """Compare the answers in a folder of labels, or in two, and list what a person has to look at.

    Writes review.html and review.jsonl, and agreed.jsonl: the labels that the labellers agree on,
    with those that were reviewed.
    """
    from raytune_vlm.label.agreement import compare, copies
    from raytune_vlm.label.folder import LabelFolder
    from raytune_vlm.label.review import take_reviewed, write_agreement

    own = LabelFolder(folder)
    second = None if other is None else LabelFolder(other)
    answers = own.answers_by_labeller(second)
    compared = compare(answers)
    for labeller in copies(answers):
        tell(
            f"{labeller} answers everything exactly as another one: does its server sample at all?"
        )
    if reviewed is not None:
        tell(f"taken over: {take_reviewed(own, reviewed, compared)} decisions")
    agreed = write_agreement(own, compared, threshold)
    for entry in agreed.fields:
        found = entry.agreement
        alpha = "" if entry.alpha is None else f", alpha {entry.alpha:.2f}"
        tell(
            f"{entry.task} {entry.field or '(text)'}: {found.value:.3f} "
            f"[{found.lower:.3f}, {found.upper:.3f}]{alpha}, {entry.num_pages:,} pages, "
            f"{entry.num_low:,} below {threshold:g}"
        )
    kept = agreed.num_agreed + agreed.num_reviewed
    tell(
        f"{kept:,} labels: {folder / 'agreed.jsonl'} ({agreed.num_agreed:,} agreed, "
        f"{agreed.num_reviewed:,} reviewed; {agreed.num_discarded:,} discarded)"
    )
    if agreed.num_left:
        tell(f"to review: {agreed.num_left:,}: {folder / 'review.html'}")


def _summary(tally: Tally, account: Account, folder: Path) -> None:
    from raytune_vlm.label.run import reasons

    copies = f", {tally.num_copies} copies left out" if tally.num_copies else ""
    tell(
        f"{tally.num_pages:,} pages{copies}: {tally.num_known:,} answers known before, "
        f"{tally.num_asked:,} requests answered now"
    )
    for reason, count in reasons(tally.rejected):
        tell(f"no label ({count}): {reason}")
    for (teacher, task), spent in sorted(account.parts.items()):
        cost = f", cost {spent.cost:,.4f}" if spent.cost else ""
        tell(
            f"{teacher}, {task}: {spent.replies:,} replies ({spent.repairs:,} repairs), "
            f"{spent.input_tokens:,} tokens read, {spent.output_tokens:,} written{cost}"
        )
    total = account.total
    tell(f"in all: {total.tokens:,} tokens, cost {total.cost:,.4f} ({folder / 'cost.json'})")
    if total.uncounted:
        tell(f"{total.uncounted:,} replies did not say how many tokens they took")
    tell(f"{tally.num_labels:,} labels: {folder / 'labels.jsonl'}")
    if tally.num_labels:
        tell(f"  as data, with data.root={folder}: {{type: messages, path: labels.jsonl}}")
