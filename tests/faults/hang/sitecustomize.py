"""Forward passes that take their time, and once, in the first process that trains, one that never
returns.

Python runs this at the start of every process that has this folder on PYTHONPATH. The file that
RAYTUNE_VLM_TEST_HANG names marks that it has happened.
"""

import os
import sys
import threading
import time
from pathlib import Path

CALL = 17
PACE_S = 0.1
"""Faults are dealt out by steps: no machine is to be done with these before they are looked at."""


def hook_when_loaded(marker: Path) -> None:
    """Wait for torch, then hook into every module."""
    while not hasattr(sys.modules.get("peft"), "PeftModel"):
        time.sleep(0.2)
    from torch.nn.modules.module import register_module_forward_hook

    calls = 0

    def hook(module, inputs, output):
        nonlocal calls
        if not (module.training and type(module).__name__.startswith("Peft")):
            return
        calls += 1
        time.sleep(PACE_S)
        if calls == CALL and not marker.exists():
            marker.touch()
            while True:
                time.sleep(3600)

    register_module_forward_hook(hook)


if os.environ.get("RAYTUNE_VLM_TEST_HANG"):
    marker = Path(os.environ["RAYTUNE_VLM_TEST_HANG"])
    threading.Thread(target=hook_when_loaded, args=(marker,), daemon=True).start()
