"""Slots on several workers: each ends as a run by itself on the same workers.

Two ranks are started once for all checks (`packed_worker.py`), on data in which most
samples, and with them many batches of a rank, have no image.
"""

from __future__ import annotations

import json

import pytest
from made import experiment, write_split
from ranks import start_ranks

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
    done = start_ranks(2, "packed_worker.py", folder / "jobs.json")
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_that_come_and_go_end_where_they_would_alone(backend, found):
    ours = found[backend]
    assert ours["exact"] == [0.0, 0.0, 0.0]
    assert max(ours["fast"]) <= 1e-4


def test_a_packed_trial_goes_on_by_itself(found):
    assert found["fsdp2"]["continued"] <= 1e-4


def test_the_planner_finds_the_same_on_every_worker(found):
    first, second = found["fsdp2"]["planned"]
    assert [probe["slots"] for probe in first] == [1, 2] and first == second


def test_a_rank_without_memory_makes_all_pack_fewer(found):
    ours = found["ddp"]["memory"]
    note = "out of memory with 3 slots at once: 2 from here on (of a test)"
    assert ours["told"] == [[2, [note]]] * 2
    assert ours["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-4)


def test_what_may_be_one_ranks_error_stops_all_slots(found):
    assert found["fsdp2"]["everywhere"] == "of a test 1"


def test_deepspeed_has_no_slots():
    plain = experiment().model_dump(exclude_unset=True)
    sections = {"train": {"backend": "deepspeed", "num_workers": 2}, "sweep": {"slots": 2}}
    with pytest.raises(ValueError, match=r"sweep\.slots=2 and train\.backend=deepspeed exclude"):
        ExperimentConfig.model_validate({**plain, **sections})
