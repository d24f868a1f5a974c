"""The plan of `make faults` fits the code, and its rows that need no process hold."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
from pathlib import Path

import pytest

from raytune_vlm.records import SweepFolder, write_json
from raytune_vlm.sweep.ledger import Ledger


@pytest.fixture(scope="module")
def parts():
    """The modules of the plan; they lie in a package of the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        found = {
            name: importlib.import_module(f"tests.faults.{name}") for name in ("plan", "files")
        }
        file = Path(__file__).parent / "strike" / "sitecustomize.py"
        spec = importlib.util.spec_from_file_location("strike", file)
        strike = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(strike)
        yield {**found, "strike": strike}


def test_every_fault_strikes_where_there_is_something(parts):
    strike = parts["strike"]
    for place, what in strike.POINTS.values():
        found = importlib.import_module(place)
        for name in what.split("."):
            found = getattr(found, name)
        assert callable(found)
    for fault in parts["plan"].FAULTS:
        assert fault.point in strike.POINTS and fault.what in strike.ACTIONS
        assert fault.moment in ("before", "in", "after") and fault.ends[-1] == 0


@pytest.fixture
def folder(tmp_path):
    """A sweep folder with a ledger and two checkpoints."""
    made = SweepFolder(tmp_path)
    ledger = Ledger(made.ledger_file)
    for number in range(3):
        ledger.append("proposed", trial_id=f"t{number:04d}", number=number, recipe={"lora.rank": 4})
        ledger.append("scored", trial_id=f"t{number:04d}", step=2, scores={"cer@micro": 0.5})
    for step in (2, 4):
        manifest, checkpoint = {}, made.trial("t0000").checkpoint(step)
        checkpoint.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"):
            content = random.Random(name).randbytes(200)
            (checkpoint / name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            manifest[name] = {"sha256": digest, "bytes": len(content)}
        write_json(checkpoint / "manifest.json", manifest)
    return made


def test_damaged_files_are_found(parts, folder):
    for name, damage in parts["files"].DAMAGES.items():
        verdict = damage(folder, random.Random(0))
        assert verdict.fault == name and not verdict.problems
