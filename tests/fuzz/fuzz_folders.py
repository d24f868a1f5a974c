"""The files of a sweep folder and of a checkpoint as readers of bytes, see `fuzz_readers`."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

from fuzz_readers import Target
from sweep_folder_example import build_example

from raytune_vlm.comparisons import Comparison, Comparisons
from raytune_vlm.errors import CheckpointError, DataError
from raytune_vlm.records import PairedTest
from raytune_vlm.report.controls import controls_section
from raytune_vlm.report.faults import faults
from raytune_vlm.report.gallery import gallery
from raytune_vlm.report.headline import headline
from raytune_vlm.report.leaderboard import leaderboard
from raytune_vlm.report.loading import load_view

_TRIAL = "trials/trial_000"
_SCORED = f"{_TRIAL}/evaluations/report/step_000400"
READ_BY_REPORT = {
    "experiment.json": "json",
    "result.json": "json",
    "ledger.jsonl": "jsonl",
    "data/manifest.json": "json",
    "data/quarantine.jsonl": "jsonl",
    f"{_TRIAL}/trial.json": "json",
    f"{_TRIAL}/metrics.jsonl": "jsonl",
    f"{_SCORED}/scores.json": "json",
    f"{_SCORED}/controls.json": "json",
    f"{_SCORED}/predictions.parquet": "binary",
}
"""Name in the sweep folder -> kind of input."""


@cache
def _example() -> Path:
    """A small finished sweep folder, built once a process."""
    parent = Path(mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, parent)
    root = build_example(parent / "sweep", state="single").root
    test = PairedTest("nted@donut", "altered", "plain", -0.2, -0.3, -0.1, 0.01, 40)
    scores = {"nted@donut": 0.7}
    compared = Comparison("blank_image", 40, scores, scores, {"nted@donut": test})
    (root / _SCORED / "controls.json").write_text(json.dumps(asdict(Comparisons([compared]))))
    return root


def _report(name: str, data: bytes, folder: Path) -> Iterable[str]:
    """Write the file, and read the folder as the page does, without its plots (seconds)."""
    root = folder / "sweep"
    (root / name).write_bytes(data)
    view = load_view(root)
    yield from view.notes
    headline(view)
    leaderboard(view)
    gallery(view)
    faults(view)
    yield from controls_section(view)["problems"]


def _copy(folder: Path) -> None:
    shutil.copytree(_example(), folder / "sweep")


def _valid(name: str) -> list[bytes]:
    return [(_example() / name).read_bytes()]


_STATE = {"step": 5, "plan_digest": "a", "recipe_digest": "b", "samples_seen": 9}


@cache
def _checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint, its manifest too."""
    import torch
    from safetensors.torch import save

    from raytune_vlm.train import random_state

    states = random_state.capture("cpu")
    tensors = {f"rng/0/{name}": value for name, value in states.items()}
    weights = {"w": torch.ones(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    files = {
        "adapter_model.safetensors": save(weights),
        "optimizer.safetensors": save({**tensors, "w/exp_avg": torch.ones(2, 3)}),
        "state.json": json.dumps(_STATE).encode(),
    }
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    return {**files, "manifest.json": json.dumps(listed).encode()}


def _write_checkpoint(folder: Path) -> None:
    for name, content_ in _checkpoint().items():
        (folder / "step_000005").mkdir(exist_ok=True)
        (folder / "step_000005" / name).write_bytes(content_)


def _verify(name: str, data: bytes, folder: Path) -> Iterable[str]:
    from raytune_vlm.train import checkpoint

    (folder / "step_000005" / name).write_bytes(data)
    found, damaged = checkpoint.newest(folder)
    assert found or damaged
    return damaged


def _tensors(data: bytes, folder: Path) -> Iterable[str]:
    from raytune_vlm.models.adapter_file import read_tensors

    (folder / "x.safetensors").write_bytes(data)
    read_tensors(folder / "x.safetensors")
    return ()


def _safetensors() -> list[bytes]:
    return [data for name, data in _checkpoint().items() if name.endswith(".safetensors")]


FOLDERS: dict[str, Target] = {
    **{
        f"report {name}": Target(
            partial(_report, name), partial(_valid, name), (DataError,), _copy, kind
        )
        for name, kind in READ_BY_REPORT.items()
    },
    "checkpoint manifest": Target(
        partial(_verify, "manifest.json"),
        lambda: [_checkpoint()["manifest.json"]],
        (),
        _write_checkpoint,
        "json",
    ),
    "safetensors": Target(_tensors, _safetensors, (CheckpointError,)),
}
