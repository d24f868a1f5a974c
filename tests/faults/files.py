"""Damaged files of a sweep that has ended: every one is found, and what was before it is used."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_vlm.errors import CheckpointError
from raytune_vlm.records import SweepFolder
from raytune_vlm.sweep.ledger import Ledger, events
from raytune_vlm.train import checkpoint
from tests.faults.verdict import Verdict

FLIPS = 300


def damaged_files(root: Path, seed: int) -> list[Verdict]:
    """Rows for the ledger and the newest checkpoint of a sweep folder."""
    chance = random.Random(f"{seed}/files")
    folder = SweepFolder(root)
    newest = max(checkpoint.steps(folder.trial("t0000").checkpoints).items())[1]
    with copied(folder.ledger_file) as ledger, copied(newest.parent) as checkpoints:
        return [
            ledger_torn(ledger, chance),
            ledger_altered(ledger, chance),
            *(checkpoint_damaged(checkpoints, how, chance) for how in ("truncated", "altered")),
        ]


def ledger_torn(file: Path, chance: random.Random) -> Verdict:
    """Each line in turn is the last one, and stops half-way; the next event follows on it."""
    content, whole = file.read_bytes(), events(file)
    lines = content.splitlines(keepends=True)
    verdict = Verdict("ledger torn", f"in each of its {len(lines)} lines", "cut off, goes on")
    for number in range(len(lines)):
        torn = lines[number][: chance.randrange(len(lines[number]))]
        file.write_bytes(b"".join(lines[:number]) + torn)
        if events(file) != whole[:number]:
            verdict.problems.append(f"line {number + 1}: other events")
        if Ledger(file).append("resumed") != number + 1 or events(file)[:-1] != whole[:number]:
            verdict.problems.append(f"line {number + 1}: nothing can follow on it")
    file.write_bytes(content)
    return verdict


def ledger_altered(file: Path, chance: random.Random) -> Verdict:
    """One bit, anywhere."""
    content, whole = file.read_bytes(), events(file)
    verdict = Verdict("ledger altered", f"one bit, at {FLIPS} places", "refused, line named")
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
        # In the last line, or the end of the one before: as if they had not been written. The name
        # of the first line's checksum: it is taken for a line that has none.
        first = {name: found[0].get(name) for name in whole[0]}
        if [first, *found[1:]] not in (whole[:-1], whole[:-2], whole):
            verdict.problems.append("other events than were written")
    file.write_bytes(content)
    return verdict


def checkpoint_damaged(checkpoints: Path, how: str, chance: random.Random) -> Verdict:
    """Each file of the newest checkpoint in turn."""
    newest, before = sorted(checkpoints.iterdir(), reverse=True)[:2]
    files = sorted(newest.iterdir())
    verdict = Verdict(
        f"checkpoint {how}", f"each of its {len(files)} files", "told, the one before is used"
    )
    for file in files:
        content = file.read_bytes()
        place = chance.randrange(len(content))
        altered = bytearray(content)
        altered[place] ^= 1 << chance.randrange(8)
        file.write_bytes(content[:place] if how == "truncated" else altered)
        found, damaged = checkpoint.newest(checkpoints)
        if found != before or len(damaged) != 1:
            verdict.problems.append(f"{file.name}: {found} is used")
        file.write_bytes(content)
    return verdict


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
