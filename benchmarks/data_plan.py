"""The plan and the index as the data grows: time, packing, memory, and preparing again.

    python benchmarks/data_plan.py

Packing on receipt-like lengths at 4,096 tokens; the plan of a million samples; the growth of memory
and of cost per sample of a feed over 1,000 and 100,000 samples (text only, so that the disk does
not count); the time of `prepare` over data that is prepared against the first time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data_path_lengths import receipt_like_lengths

PACK_LENGTH = 4096


def packing() -> None:
    """Efficiency of packs, and the time of a plan."""
    from raytune_vlm.prepare.plan import Plan, PlanSpec

    for count, pack in ((20_000, PACK_LENGTH), (1_000_000, PACK_LENGTH), (1_000_000, None)):
        lengths, sources = receipt_like_lengths(count, seed=0), np.zeros(count, dtype=int)
        began = time.perf_counter()
        plan = Plan(lengths, sources, PlanSpec(16, 0, pack_length=pack), data_digest="")
        plan.epoch(0)
        seconds = time.perf_counter() - began
        what = f"packed into {pack}: efficiency {plan.efficiency():.4f}" if pack else "not packed"
        print(f"plan of {count:,} samples, {what}, {seconds:.2f} s")


def prepared(count: int, folder: Path) -> dict[str, float]:
    """Prepare `count` short chats, twice, as a driver does; leaves `store.json` for `fed`."""
    import ray

    from raytune_vlm.config import ExperimentConfig
    from raytune_vlm.prepare.prepare import list_shards, prepare

    with (folder / "rows.jsonl").open("w") as stream:
        for number in range(count):
            talk = [("user", f"count {number}"), ("assistant", str(number))]
            turns = [{"role": role, "content": text} for role, text in talk]
            stream.write(json.dumps({"messages": turns}) + "\n")
    source = {"type": "messages", "path": str(folder / "rows.jsonl"), "split": "train"}
    config = ExperimentConfig.model_validate(
        {"name": "growth", "storage_path": str(folder), "data": {"sources": [source]}}
    )
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    began = time.perf_counter()
    data = prepare(config, list_shards(config), lambda *_: None)
    first = time.perf_counter() - began
    began = time.perf_counter()
    prepare(config, list_shards(config), lambda *_: None)
    again = time.perf_counter() - began
    ray.shutdown()
    (folder / "store.json").write_text(json.dumps([data.manifest.store, str(data.index_file)]))
    return {"prepare_s": first, "prepare_again_s": again, "driver_mb": _own_memory_mb()}


def fed(count: int, folder: Path) -> dict[str, float]:
    """400 steps of 8 of the prepared chats, as a worker takes them; memory and CPU time."""
    from raytune_vlm.prepare.feed import CachedFeed, Collation
    from raytune_vlm.prepare.plan import Plan, PlanSpec
    from raytune_vlm.prepare.store import open_split

    store, index_file = json.loads((folder / "store.json").read_text())
    split = open_split(store, index_file, "train")
    plan = Plan(split.lengths, split.sources, PlanSpec(8, 0), data_digest="")
    feed = CachedFeed(split, plan, Collation("idefics3", 0, 8))
    feed.step(0)
    cpu = time.process_time()
    for step in range(1, 401):
        feed.step(step % (count // 8))
    cpu = time.process_time() - cpu
    return {"feed_cpu_us_per_sample": 1e6 * cpu / (400 * 8), "worker_mb": _own_memory_mb()}


def _own_memory_mb() -> float:
    """Memory of this process without the pages of files that it maps: those can be dropped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous = next(line for line in lines if line.startswith("RssAnon"))
    return int(anonymous.split()[1]) / 1024


def growth() -> None:
    """`prepared` and `fed` for 1,000 and 100,000 samples, each in a process of its own."""
    found = []
    for count in (1_000, 100_000):
        entry: dict[str, float] = {"samples": count}
        with tempfile.TemporaryDirectory(prefix="raytune_vlm-plan-") as folder:
            for step in ("prepared", "fed"):
                done = subprocess.run(
                    [sys.executable, __file__, step, str(count), folder],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                entry |= json.loads(done.stdout.splitlines()[-1])
        found.append(entry)
        print(entry)
    small, large = found
    for name in ("driver_mb", "worker_mb", "feed_cpu_us_per_sample"):
        print(f"{name}, 100 times the data: {large[name] / small[name]:.2f}")
    per_sample = [entry["prepare_s"] / entry["samples"] for entry in found]
    print(f"preparation per sample, 100 times the data: {per_sample[1] / per_sample[0]:.2f}")
    print(f"preparing again / first time: {large['prepare_again_s'] / large['prepare_s']:.4f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step = {"prepared": prepared, "fed": fed}[sys.argv[1]]
        print(json.dumps(step(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        packing()
        growth()
