"""Fuzz readers with hypothesis, each in a process of its own with limits of time and memory.

    python tests/fuzz/run_fuzz.py --examples 2000                      every reader (`make fuzz`)
    python tests/fuzz/run_fuzz.py --examples 2000 --readers document   one
    python tests/fuzz/run_fuzz.py --replay document FILE               an input that failed

Prints a line of JSON for each reader: what was run, and what failed with which input. An input is
kept under `--keep`. It ends with status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz_folders import FOLDERS
from fuzz_inputs import inputs
from fuzz_readers import TARGETS as FILES
from fuzz_readers import Target
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from raytune_vlm.errors import ConfigError
from raytune_vlm.visible import one_line

TARGETS = {**FILES, **FOLDERS}
CPU_SECONDS, WALL_SECONDS = 10, 60
"""For one input. Only waiting (for a FIFO, say) takes much longer than it computes."""
MEMORY_BYTES = 512 << 20
"""So much more than a reader had before its first input may it have at any time."""
ADDRESS_BYTES = 2 << 30
"""The same of addresses: what asks for more is refused by the system, before it fills memory."""
LONGEST_REFUSAL = 2000
"""Characters, but of what names a key of one's own experiment."""


class Finding(Exception):
    """A reader broke its promise; the text says how."""


@dataclass
class Outcome:
    """What became of one reader."""

    reader: str
    executions: int = 0
    refused: int = 0
    """Executions in which something was refused."""
    seconds: float = 0.0
    peak_mb: int = 0
    """The most memory that an input took on top of what the process had."""
    failure: str = ""
    input_file: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    """The most frequent first words of refusals, to see what was reached."""


def memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def execute(
    target: Target, data: bytes, folder: Path, before: int, *, timers: bool = True
) -> list[str]:
    """Read the bytes once, and give what was refused; `timers` ends the process that hangs.

    Raises Finding where something else escapes than the reader's errors, where a refusal is not one
    safe line, or where it took too much memory.
    """
    if timers:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        refused = list(target.read(data, folder))
    except target.errors as error:
        refused = str(error).split("\n")  # of a ConfigError: a line for each problem
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        raise Finding(f"{type(error).__name__} at {place}: {error!s:.200}") from error
    finally:
        if timers:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    for text in refused:
        too_long = len(text) > LONGEST_REFUSAL and ConfigError not in target.errors
        if one_line(text) != text or too_long:
            raise Finding(f"a refusal is not one line that is safe to show: {text!r:.300}")
    if memory() > before + MEMORY_BYTES:
        raise Finding(f"it took {(memory() - before) >> 20} MB")
    return refused


def _fuzz(target: Target, outcome: Outcome, examples: int, number: int, folder: Path) -> None:
    """In the child: run hypothesis; the last input tried is always on disk."""
    target.prepare(folder)
    for data in target.valid():
        list(target.read(data, folder))  # what is loaded at the first use belongs to `before`
    before = memory()
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESS_BYTES,) * 2)
    for kind in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(kind, signal.SIG_DFL)
    found: Counter[str] = Counter()
    current = folder.with_name("input")

    def one(data: bytes) -> None:
        current.write_bytes(data)
        refused = execute(target, data, folder, before)
        outcome.executions += 1
        outcome.refused += bool(refused)
        found.update(text[:24] for text in refused)

    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=checks,
        verbosity=Verbosity.quiet,
    )
    try:
        seed(number)(run(given(inputs(target))(one)))()
    except BaseException as error:  # hypothesis raises what the last, smallest input raised
        outcome.failure = str(error) if isinstance(error, Finding) else f"{error!r:.500}"
    outcome.kinds = dict(found.most_common(12))
    outcome.peak_mb = (memory() - before) >> 20


def fuzz(name: str, target: Target, examples: int, number: int, keep: Path | None) -> Outcome:
    """Run a reader's inputs in a child process."""
    started = time.monotonic()
    target.valid()  # what it makes only once, it makes before the fork
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        told = Path(temporary) / "outcome.json"
        child = os.fork()
        if child == 0:
            outcome = Outcome(name)
            try:
                _fuzz(target, outcome, examples, number, folder)
            except BaseException as error:
                outcome.failure = f"not started: {error!r:.500}"
            told.write_text(json.dumps(asdict(outcome)))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            outcome = Outcome(**json.loads(told.read_text()))
        else:
            outcome = Outcome(name, failure=_death(status))
        if outcome.failure and keep is not None and (Path(temporary) / "input").exists():
            keep.mkdir(parents=True, exist_ok=True)
            kept = keep / f"{name.replace(' ', '_').replace('/', '_')}.input"
            shutil.copy(Path(temporary) / "input", kept)
            outcome.input_file = str(kept)
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def _death(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it took more than {CPU_SECONDS} s of CPU time"
    if status == -signal.SIGALRM:
        return f"it took more than {WALL_SECONDS} s"
    return f"the process ended with status {status}"


def replay(name: str, target: Target, file: Path) -> None:
    """Read one kept input, without limits of addresses, and print what comes of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target.prepare(folder)
        for text in execute(target, file.read_bytes(), folder, memory()):
            sys.stdout.write(f"{text!r}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="*")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--replay", nargs=2, metavar=("READER", "FILE"))
    given_ = parser.parse_args()
    if given_.replay:
        name, file = given_.replay
        replay(name, TARGETS[name], Path(file))
        return 0
    failed = False
    for name in given_.readers or TARGETS:
        outcome = fuzz(name, TARGETS[name], given_.examples, given_.seed, given_.keep)
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()
        failed |= bool(outcome.failure)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
