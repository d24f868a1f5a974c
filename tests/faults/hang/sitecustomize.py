"""Once, in the first process that trains: a forward pass that never returns.

Python runs this at the start of every process that has this folder on PYTHONPATH. The file that
RAYTUNE_VLM_TEST_HANG names marks that it has happened.
"""

import os
import sys
import threading
import time
from pathlib import Path

CALL = 17


def hang_once(marker: Path) -> None:
    """Wait for torch, then hook into every module."""
    while not hasattr(sys.modules.get("peft"), "PeftModel"):
        time.sleep(0.05)
    from torch.nn.modules.module import register_module_forward_hook

    calls = 0

    def hook(module, inputs, output):
        nonlocal calls
        calls += module.training and type(module).__name__.startswith("Peft")
        if calls == CALL and not marker.exists():
            marker.touch()
            while True:
                time.sleep(3600)

    register_module_forward_hook(hook)


if os.environ.get("RAYTUNE_VLM_TEST_HANG"):
    marker = Path(os.environ["RAYTUNE_VLM_TEST_HANG"])
    if not marker.exists():
        threading.Thread(target=hang_once, args=(marker,), daemon=True).start()
