"""Slots on several workers: each ends as a run by itself on the same workers.

Two gloo processes are started once for all checks (`packed_worker.py`), on data in which most
samples, and with them many batches of a rank, have no image.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made import cli_environment, experiment, write_split

from raytune_vlm.config import ExperimentConfig

BACKENDS = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def found(tiny_model, tiny_base, tmp_path_factory):
    """What the checks with every backend found."""
    folder = tmp_path_factory.mktemp("packed")
    write_split(tiny_base("idefics3"), folder / "store", "train")
    model = str(tiny_model("idefics3"))
    jobs = {"model": model, "store": str(folder / "store"), "folder": str(folder)}
    (folder / "jobs.json").write_text(json.dumps({**jobs, "backends": BACKENDS}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).parent / "packed_worker.py"), str(folder / "jobs.json")]
    environment = {**cli_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_that_come_and_go_end_where_they_would_alone(backend, found):
    ours = found[backend]
    assert ours["exact"] == [0.0, 0.0, 0.0] and ours["exact, continued"] == 0.0
    assert max(*ours["fast"], ours["fast, continued"]) <= 1e-4
    assert ours["planned"] == [1, 2]


@pytest.mark.parametrize(
    ("what", "note", "together"),
    [
        ("memory", "out of memory with 3 slots at once: 2 from here on (of a test)", 2),
        ("error", "ValueError with 3 slots at once: 1 from here on (of a test)", 1),
    ],
)
def test_a_rank_that_fails_alone_makes_all_pack_fewer(what, note, together, found):
    ours = found["ddp"][what]
    assert ours["found"] == [[together, [note]]] * 2
    assert ours["distance"] <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_may_be_one_ranks_error_stops_all_slots(backend, found):
    assert found[backend]["everywhere"] == "of a test 1"


def test_deepspeed_has_no_slots():
    plain = experiment().model_dump(exclude_unset=True)
    sections = {"train": {"backend": "deepspeed", "num_workers": 2}, "sweep": {"slots": 2}}
    with pytest.raises(ValueError, match=r"sweep\.slots=2 and train\.backend=deepspeed exclude"):
        ExperimentConfig.model_validate({**plain, **sections})
