"""Faults at named points, in whichever process of a sweep passes them.

Python runs this at the start of every process that has this folder on PYTHONPATH.
RAYTUNE_VLM_TEST_FAULTS names a folder: `plan.json` says where what strikes (`faults/plan.py`), and
`trace.jsonl` gets a line for every passage and strike, of all processes and lives of a sweep.
"""

import errno
import functools
import importlib.machinery
import inspect
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

POINTS = {
    "ledger": ("raytune_vlm.sweep.ledger", "Ledger.append"),
    "proposal": ("raytune_vlm.sweep.study", "SweepStudy.propose"),
    "proxy": ("raytune_vlm.sweep.proxy", "Proxy.step"),
    "trial": ("raytune_vlm.sweep.trial_job", "TrialJob.__init__"),
    "step": ("raytune_vlm.sweep.trial_job", "TrialJob._stepped"),
    "loss": ("raytune_vlm.train.objective", "FromLabels.__call__"),
    "checkpoint": ("raytune_vlm.train.checkpoint", "save"),
    "answer": ("raytune_vlm.evaluate.answers", "AnswerWriter.add"),
}
"""Name -> module and what in it is wrapped."""

FOLDER = Path(os.environ.get("RAYTUNE_VLM_TEST_FAULTS", ""))
clock = time.time
here = {"trial": None}


def details(point, args, kwargs):
    """What a plan can be narrowed to, and the trace tells."""
    if point == "ledger":
        return {"event": args[1], "trial": kwargs.get("trial_id")}
    if point == "trial":
        here["trial"] = args[2].job_id
    if point == "step":
        return {"trial": args[0].job.job_id, "step": args[2].step}
    return dict(here)


def trace():
    """All passages and strikes so far."""
    file = FOLDER / "trace.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tell(row):
    with (FOLDER / "trace.jsonl").open("a") as stream:
        stream.write(json.dumps({"pid": os.getpid(), "time": clock(), **row}) + "\n")


def is_due(plan, point, passage):
    """Whether this passage is to be struck."""
    before = trace()
    tell({"point": point, **passage})
    only = plan.get("only", {})
    if point != plan.get("point") or any(passage[key] != only[key] for key in only):
        return False
    number = 1 + sum(
        row.get("point") == point and all(row[key] == only[key] for key in only) for row in before
    )
    struck = sum("struck" in row for row in before)
    return number >= plan["number"] and struck < plan.get("times", 1)


def strike(plan, args, result=None):
    """Let the fault happen; what the wrapped function gives instead of its result."""
    tell({"struck": plan["what"]})
    return ACTIONS[plan["what"]](plan, args, result)


def victims(plan):
    """Process ids of whom a plan names: this one, the driver, or Ray's actors of a class."""
    name = plan.get("victim", "self")
    if name == "self":
        return [os.getpid()]
    if name == "driver":
        return [json.loads((Path(plan["root"]) / "lease.json").read_text())["pid"]]
    ours, found = f"RAYTUNE_VLM_TEST_FAULTS={FOLDER}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().decode(errors="replace")
            known = ours in (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if known and title.startswith("ray::") and name in title:
            found.append(int(process.name))
    assert found, f"no process of {name}"
    return found


def send(plan, args, result):
    for victim in victims(plan):
        os.kill(victim, getattr(signal, plan.get("signal", "SIGKILL")))
    return result


def hang(plan, args, result):
    while True:
        time.sleep(3600)


def fail(plan, args, result):
    if "errno" in plan:
        number = getattr(errno, plan["errno"])
        raise OSError(number, os.strerror(number))
    raise RuntimeError("struck by a test")


def no_number(plan, args, result):
    return result * float("nan")


def no_memory(plan, args, result):
    import torch

    raise torch.OutOfMemoryError("struck by a test")


def damage(plan, args, result):
    """The checkpoint that was just written is cut short or altered; then this process dies."""
    file = Path(args[0]) / plan["file"]
    content = bytearray(file.read_bytes())
    place = int(len(content) * plan["place"])
    if plan["how"] == "truncated":
        content = content[:place]
    else:
        content[place] ^= 1 << 3
    file.write_bytes(content)
    return send(plan, args, result)


def set_clock_back(plan, args, result):
    time.time = lambda: clock() - 3600
    return result


def fill(plan, args, result):
    """Not a byte is left on the file system of the sweep folder."""
    with (Path(plan["storage"]) / "filler").open("wb", buffering=0) as stream:
        size = 1 << 20
        while size:
            try:
                stream.write(b"x" * size)
            except OSError:
                size //= 2
    return result


def hide(plan, args, result):
    """The storage is gone: an empty file system that takes nothing is mounted over it."""
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", plan["storage"]]
    subprocess.run(command, check=True)
    return result


def start_second(plan, args, result):
    """A second driver of the folder, while this one waits for its end."""
    command = [sys.executable, "-m", "raytune_vlm", "resume", plan["root"]]
    done = subprocess.run(command)
    assert done.returncode == 2, done.returncode
    return result


ACTIONS = {
    "second": start_second,
    "kill": send,
    "hang": hang,
    "raise": fail,
    "nan": no_number,
    "oom": no_memory,
    "damage": damage,
    "clock": set_clock_back,
    "fill": fill,
    "hide": hide,
}


def torn(plan, args):
    """`os.fsync` that first cuts the file short, as if the rest had not come to the disk."""
    sync = os.fsync

    def fsync(descriptor):
        os.fsync = sync
        about = os.fstat(descriptor)
        if stat.S_ISREG(about.st_mode) and plan["what"] != "raise":
            lines = Path(f"/proc/self/fd/{descriptor}").read_bytes().splitlines(keepends=True)
            os.truncate(f"/proc/self/fd/{descriptor}", about.st_size - len(lines[-1]) // 2)
        strike(plan, args)
        return sync(descriptor)

    os.fsync = fsync


def wrapped(plan, point, function):
    def enters(args, kwargs):
        due = is_due(plan, point, details(point, args, kwargs))
        moment = plan["moment"] if due else None
        if moment == "before":
            strike(plan, args)
        elif moment == "in":
            torn(plan, args)
        return moment

    def call(*args, **kwargs):
        moment = enters(args, kwargs)
        result = function(*args, **kwargs)
        return strike(plan, args, result) if moment == "after" else result

    return functools.wraps(function)(call)


class Finder:
    """Imports the modules of `POINTS` as they are, then wraps what they name."""

    @staticmethod
    def find_spec(name, path, target=None):
        if name not in {module for module, _ in POINTS.values()}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            plan = json.loads((FOLDER / "plan.json").read_text())
            for point, (place, what) in POINTS.items():
                if place == name:
                    owner, _, attribute = what.rpartition(".")
                    holder = getattr(module, owner) if owner else module
                    function = inspect.getattr_static(holder, attribute)
                    setattr(holder, attribute, wrapped(plan, point, function))

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("RAYTUNE_VLM_TEST_FAULTS"):
    sys.meta_path.insert(0, Finder)
