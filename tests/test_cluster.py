"""Resources: what can never be had is refused, what is waited for is told."""

from __future__ import annotations

import pytest
from made import experiment

from raytune_vlm.errors import ConfigError
from raytune_vlm.sweep.cluster import check_resources
from raytune_vlm.sweep.waiting import pending


def asked(executors=1, workers=1, cpus=1.0, gpus=0.0):
    return experiment(
        sweep={"num_executors": executors},
        train={"num_workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus},
    )


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        (asked(executors=2, workers=2), [{"CPU": 4}]),
        (asked(executors=3, cpus=0.1), [{"CPU": 0.3}]),
        (asked(executors=2, cpus=2), [{"CPU": 3}, {"CPU": 3}]),
        (asked(executors=4, cpus=0.5, gpus=0.5), [{"CPU": 2, "GPU": 2}]),
        (asked(executors=6, cpus=0.3, gpus=0.3), [{"CPU": 1.8, "GPU": 2}]),
        (asked(executors=3, cpus=0.1, gpus=0.3333), [{"CPU": 1, "GPU": 1}]),
        (asked(workers=4, cpus=0.7, gpus=1), [{"CPU": 1.4, "GPU": 2}, {"CPU": 1.4, "GPU": 2}]),
        (asked(executors=10, cpus=0.1, gpus=0.1), [{"CPU": 1, "GPU": 1}]),
        (asked(executors=2, gpus=2), [{"CPU": 8, "GPU": 4}, {"CPU": 8}]),
    ],
)
def test_what_the_nodes_hold_is_taken(wanted, nodes):
    check_resources(wanted, nodes)


@pytest.mark.parametrize(
    ("wanted", "nodes", "room"),
    [
        (asked(executors=5), [{"CPU": 4}], "room for 4: 1 node of 4 CPU + 0 GPU;"),
        # Six CPUs in all, but no node has four.
        (
            asked(cpus=4),
            [{"CPU": 3}, {"CPU": 3, "GPU": 1}],
            "room for 0: 1 node of 3 CPU + 1 GPU, 1 node of 3",
        ),
        # A worker's part of a GPU lies on one of them: two GPUs hold 2 x 2 of 0.4.
        (asked(executors=5, cpus=0.1, gpus=0.4), [{"CPU": 4, "GPU": 2}], "0.4 GPU each"),
        (
            asked(executors=9),
            [{"CPU": 2}, {"CPU": 2, "GPU": 1}, {"CPU": 2}],
            "room for 6: 1 node of 2 CPU + 1 GPU, 2 nodes of 2 CPU + 0 GPU;",
        ),
        # Of three 0.3 on a GPU a tenth is left over, which is of no use to a fourth.
        (asked(executors=7, cpus=0.1, gpus=0.3), [{"CPU": 4, "GPU": 2}], "room for 6: "),
        # The rest of one GPU and the rest of the other are no whole one.
        (asked(executors=3, gpus=2), [{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], "room for 2: "),
        (asked(gpus=1), [{"CPU": 4}], "1 CPU \\+ 1 GPU each, but the cluster has room for 0"),
    ],
)
def test_what_can_never_be_had_is_refused_with_what_is_there(wanted, nodes, room):
    with pytest.raises(ConfigError, match=room.replace("CPU + ", "CPU \\+ ")):
        check_resources(wanted, nodes)


def test_only_the_own_groups_without_a_place_are_waited_for():
    def group(state, *bundles):
        return {"state": state, "bundles": dict(enumerate(bundles))}

    groups = {
        "aa05000000": group("PENDING", {"CPU": 2.0, "GPU": 0.5}, {"CPU": 2.0, "GPU": 0.5}),
        "bb05000000": group("CREATED", {"CPU": 8.0}),
        "cc06000000": group("PENDING", {"CPU": 16.0}),
    }
    assert pending(groups, "05000000") == {"CPU": 4.0, "GPU": 1.0}
    assert pending(groups, "07000000") == {}
