"""Chat templates are programs that come with a model: each is tried once before it is used.

transformers renders them in a sandbox, which neither ends a loop nor bounds a text. A template
that behaves in the probe may still be slow on other conversations: that is not caught here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from raytune_vlm.errors import ModelError

PROBE = Path(__file__).with_name("template_probe.py")
CPU_SECONDS, WALL_SECONDS = 10, 300
MEMORY_BYTES = 1 << 30


@cache
def check_template(template: str, name: str) -> None:
    """Raise ModelError for a template that loops, fills the memory or leaves the sandbox.

    `name` is the model's. A template that passed is remembered on this machine, by its digest.
    """
    from huggingface_hub.constants import HF_HOME

    digest = hashlib.sha256(PROBE.read_bytes() + template.encode("utf-8", "replace")).hexdigest()
    passed = Path(HF_HOME) / "raytune_vlm" / "templates" / digest
    if passed.exists():
        return
    if reason := _refusal(template):
        raise ModelError(f"model.name={name!r}: its chat template is refused: {reason}")
    with suppress(OSError):  # a cache that cannot be written costs another probe
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()


def _refusal(template: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROBE), str(CPU_SECONDS), str(MEMORY_BYTES)],
            input=template.encode("utf-8", "replace"),
            capture_output=True,
            timeout=WALL_SECONDS,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {WALL_SECONDS} s"
    if done.returncode < 0:  # the kernel ended it
        return f"it does not end within {CPU_SECONDS} s of computing"
    if done.returncode > 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return f"it could not be tried: {lines[-1] if lines else done.returncode}"
    return done.stdout.decode("utf-8", "replace")
