"""Damaged files of a sweep that has ended: every one is found, and what was before it is used."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from raytune_vlm.errors import CheckpointError
from raytune_vlm.records import SweepFolder
from raytune_vlm.sweep.ledger import Ledger, events
from raytune_vlm.train import checkpoint
from tests.faults.verdict import Verdict

FLIPS = 300
Damage = Callable[[SweepFolder, random.Random], Verdict]


def ledger_torn(folder: SweepFolder, chance: random.Random) -> Verdict:
    """Each line in turn is the last one, and stops half-way; the next event follows on it."""
    whole = events(folder.ledger_file)
    verdict = Verdict(
        "ledger cut off", f"in each of its {len(whole)} lines", "cut off there, goes on"
    )
    with copied(folder.ledger_file) as file:
        lines = file.read_bytes().splitlines(keepends=True)
        for number in range(len(lines)):
            torn = lines[number][: chance.randrange(len(lines[number]))]
            file.write_bytes(b"".join(lines[:number]) + torn)
            if events(file) != whole[:number]:
                verdict.problems.append(f"line {number + 1}: other events")
            if Ledger(file).append("resumed") != number + 1 or events(file)[:-1] != whole[:number]:
                verdict.problems.append(f"line {number + 1}: nothing can follow on it")
    return verdict


def ledger_altered(folder: SweepFolder, chance: random.Random) -> Verdict:
    """One bit, anywhere."""
    whole, content = events(folder.ledger_file), folder.ledger_file.read_bytes()
    verdict = Verdict("ledger altered", f"one bit, at {FLIPS} places", "refused, line named")
    with copied(folder.ledger_file) as file:
        for _ in range(FLIPS):
            altered = bytearray(content)
            altered[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(altered)
            try:
                found = events(file)
            except CheckpointError as error:
                if f"{file}:" not in error.message:
                    verdict.problems.append(error.message)
                continue
            # In the last line, or the end of the one before: as if they had not been written. In
            # the name of the first line's checksum: it is taken for a line that has none.
            first = {name: found[0].get(name) for name in whole[0]}
            if [first, *found[1:]] not in (whole[:-1], whole[:-2], whole):
                verdict.problems.append("other events than were written")
    return verdict


def checkpoint_damaged(how: str, folder: SweepFolder, chance: random.Random) -> Verdict:
    """Each file of the newest checkpoint in turn."""
    with copied(folder.trial("t0000").checkpoints) as checkpoints:
        newest, before = sorted(checkpoints.iterdir(), reverse=True)[:2]
        files = sorted(newest.iterdir())
        where = f"each of the {len(files)} files of one"
        verdict = Verdict(f"checkpoint file {how}", where, "told, the one before is used")
        for file in files:
            content = file.read_bytes()
            place = chance.randrange(len(content))
            altered = bytearray(content)
            altered[place] ^= 1 << chance.randrange(8)
            file.write_bytes(content[:place] if how == "cut off" else altered)
            found, damaged = checkpoint.newest(checkpoints)
            if found != before or len(damaged) != 1:
                verdict.problems.append(f"{file.name}: {found} is used")
            file.write_bytes(content)
    return verdict


DAMAGES: dict[str, Damage] = {
    "ledger cut off": ledger_torn,
    "ledger altered": ledger_altered,
    "checkpoint file cut off": partial(checkpoint_damaged, "cut off"),
    "checkpoint file altered": partial(checkpoint_damaged, "altered"),
}
"""Rows that need no process."""


@contextmanager
def copied(place: Path) -> Iterator[Path]:
    """A copy of a file or folder."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / place.name
        if place.is_dir():
            shutil.copytree(place, copy)
        else:
            shutil.copy(place, copy)
        yield copy
