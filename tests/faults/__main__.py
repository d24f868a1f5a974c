"""Every fault of the plan, each compared with the undisturbed sweep of the same seed.

    python -m tests.faults [--only WORDS] [--seed N] [--write docs/reliability.md]

Ends with 1 if anything is not as promised.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.small import NUM_TRIALS  # isort: skip  (puts tests/ on the path)
from tests.faults import table
from tests.faults.files import DAMAGES
from tests.faults.lives import Lives
from tests.faults.plan import CHANGES, FAULTS, HALFWAY
from tests.faults.verdict import Verdict


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", help="rows whose names contain this; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="draws where the faults strike")
    parser.add_argument("--write", type=Path, help="the page that gets the table")
    parser.add_argument("--minutes", type=float, help="begin no row after these")
    parser.add_argument("--folder", type=Path, help="kept, and new; otherwise a temporary one")
    return parser.parse_args()


def rows(lives: Lives, names: list[str], ends: float | None) -> Iterator[Verdict]:
    """The verdicts, one row of the plan after the other; `names` loses those that were run."""
    faults = {fault.name: fault for fault in FAULTS}
    changes = {change.name: change for change in CHANGES}
    for name in list(names):
        if ends is not None and time.monotonic() > ends:
            return
        names.remove(name)
        if name in faults:
            yield lives.strike(faults[name])
        elif name in changes:
            yield lives.resume_changed(changes[name])
        else:
            yield lives.damage(DAMAGES[name])


def main() -> int:
    given = arguments()
    known = [*(entry.name for entry in (*FAULTS, *CHANGES)), *DAMAGES]
    names = [
        name for name in known if given.only is None or any(words in name for words in given.only)
    ]
    if any(change.name in names for change in CHANGES) and HALFWAY not in names:
        names.insert(0, HALFWAY)  # what is resumed with changes
    folder = given.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    ends = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    good = True
    with Lives(folder.resolve(), given.seed) as lives:
        print(f"undisturbed, {NUM_TRIALS} trials: {lives.undisturbed():.0f} s", flush=True)
        began = time.monotonic()
        for verdict in rows(lives, names, ends):
            good = good and not verdict.problems
            spent = time.monotonic() - began
            print(" | ".join(table.row(verdict)), f"({spent:.0f} s in all)", flush=True)
            if given.write is not None:
                table.write(given.write, [verdict], known)
    if names:
        print(f"not run for want of time: {', '.join(names)}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
