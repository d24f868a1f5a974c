"""Several ranks of a worker on this machine, forked from one process: what they import costs once.

python ranks.py COUNT WORKER.py JOBS.json

WORKER.py has a `main`, which every rank calls with the file of jobs, in the environment that
`torch.distributed` reads. Where a rank fails, the others are ended: they would wait for it.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType


def start_ranks(count: int, worker: str, jobs: Path) -> subprocess.CompletedProcess[str]:
    """Run this file for a worker that lies beside it; both streams are kept."""
    from made import cli_environment

    here = Path(__file__)
    command = [sys.executable, str(here), str(count), str(here.with_name(worker)), str(jobs)]
    environment = {**cli_environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)


def main(count: int, worker: Path, jobs: Path) -> int:
    """Fork the ranks and wait for them; 0 where all ended well."""
    # What workers import as they go.
    import peft  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    loaded = importlib.import_module(worker.stem)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = set()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            own = {**group, "RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in own.items()})
            os._exit(one_rank(loaded, jobs))
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def one_rank(worker: ModuleType, jobs: Path) -> int:
    """The exit status of a rank, whose error is printed."""
    status = 1
    try:
        worker.main(jobs)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
