"""The examples of docs/extending.md, put into the real tables, pass the tests that they name."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_benchmarks
import test_metrics
import test_models
import test_searchers
import test_sources
import torch
from documents import ROOT
from test_searchers import Sweep
from watched import Watched, config

from raytune_vlm.config.report import ReportConfig
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.evaluate import benchmarks
from raytune_vlm.evaluate.benchmarks.fixture_rows import draw
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.sources import SOURCES
from raytune_vlm.sweep.samplers import SAMPLERS
from raytune_vlm.sweep.trackers import TRACKERS
from raytune_vlm.sweep.trackers.follower import Follower
from raytune_vlm.train.backends.ddp import Ddp
from raytune_vlm.train.world import World

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
CONTRACTS = Path(__file__).parent / "contracts"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Heading -> its Python blocks as a module, and what its blocks evaluate to as `ENTRIES`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(heading: str) -> ModuleType:
        section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        source = "ENTRIES = []\n"
        for block in re.findall(r"```python\n(.*?)```", section, re.S):
            last = ast.parse(block).body[-1]
            if isinstance(last, ast.Expr):
                before = "".join(block.splitlines(keepends=True)[: last.lineno - 1])
                block = f"{before}ENTRIES.append({ast.get_source_segment(block, last)})\n"
            source += block
        name = f"extending_{heading.replace(' ', '_').lower()}"
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def add(monkeypatch: pytest.MonkeyPatch, table: Any, entries: dict[str, Any]) -> str:
    """List the one entry for the time of the test; its name."""
    ((name, entry),) = entries.items()
    assert name not in table
    monkeypatch.setitem(table, name, entry)
    return name


def test_the_metric(example, monkeypatch):
    (metric,) = example("A metric").ENTRIES
    name = add(monkeypatch, METRICS, {metric.name: metric})
    for check in (
        test_metrics.test_identical_texts_score_best,
        test_metrics.test_any_two_texts_have_a_finite_score,
        test_metrics.test_missing_prediction_is_empty_text,
        test_metrics.test_best_reference_counts,
        test_metrics.test_reference_is_required,
    ):
        check(name)
    for kind in test_metrics.GARBAGE:
        test_metrics.test_garbage_is_scored_in_time(name, kind)
    assert metric.score("a cup of tea", ["a cup"]).value == 0.5


def test_the_benchmark(example, monkeypatch, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (entry,) = example("A benchmark").ENTRIES
    name = add(monkeypatch, benchmarks.BENCHMARKS, {"signs": entry})
    row = {"image": draw("STOP"), "question": "What does it say?", "answers": ["stop"]}
    folder = tmp_path / name
    folder.mkdir()
    rows = [{**row, "id": str(number), "street": "High Street"} for number in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    found = test_benchmarks.read(name, data=str(tmp_path))
    assert [sample.group_id for sample in found] == [found[0].group_id] * 2
    assert test_benchmarks.prompt_of(found[0]).startswith("What does it say?\nAnswer with")
    assert test_benchmarks.reference_of(found[0]).answers == ("stop",)


def test_the_source(example, monkeypatch, tmp_path):
    module = example("A source")
    kind = add(monkeypatch, SOURCES, module.ENTRIES[0])
    monkeypatch.setitem(test_sources.MODELS, kind, module.ChecklistSource)
    row = lambda number, image: {"picture": image, "defects": [f"crack {number}"]}  # noqa: E731
    monkeypatch.setitem(test_sources.ROWS, kind, row)
    monkeypatch.setitem(
        test_sources.MAKERS, kind, lambda folder: test_sources.make_table(kind, folder)
    )
    for number, check in enumerate(
        (
            test_sources.test_a_bad_row_is_quarantined_and_its_neighbours_survive,
            test_sources.test_ids_are_stable_and_unique,
            test_sources.test_a_missing_path_names_the_nearest,
            test_sources.test_an_image_beyond_the_limit_is_refused,
            test_sources.test_the_image_files_that_were_read_are_noted,
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(kind, folder)
    (tmp_path / "a.png").write_bytes(test_sources.png())
    rows = [{"picture": "a.png", "defects": []}, {"picture": "a.png", "defects": "crack"}]
    good, bad = test_sources.read(
        kind, test_sources.lines(tmp_path / "parts.jsonl", *rows).name, tmp_path
    )
    assert good.answer == "none" and bad.reason == "column 'defects' must be a list of texts"


def test_the_family(example, monkeypatch, tiny_base):
    entry, builder = example("A model family").ENTRIES
    name = add(monkeypatch, FAMILIES, {entry.model_type: entry})
    assert add(monkeypatch, BUILDERS, builder) == name
    for scope in entry.scopes:
        test_models.test_a_scope_gets_adapters_and_nothing_else_does(name, scope, tiny_base)
    test_models.test_every_parameter_but_the_head_lies_in_one_scope(name, tiny_base)
    test_models.test_attach_depends_on_the_seed_only_and_unload_restores(name, tiny_base)
    monkeypatch.syspath_prepend(str(CONTRACTS))
    contract = importlib.import_module("test_batches")
    contract.test_a_batch_has_the_loss_of_its_samples(name, tiny_base)


def test_the_search_algorithm(example, monkeypatch, tmp_path):
    module = example("A search algorithm")
    kind = add(monkeypatch, SAMPLERS, module.ENTRIES[0])
    searcher = module.IndependentTpeSearcher(type=kind, num_startup_trials=3)
    own = test_searchers.sampled("random", num_trials=7)
    own = own.model_copy(update={"sweep": own.sweep.model_copy(update={"searcher": searcher})})
    whole = Sweep(tmp_path / "whole", own).run()
    broken: list[Any] = []
    for most in (4, None):
        broken += Sweep(tmp_path / "broken", own).run(most=most)
    assert len(whole) == own.sweep.num_trials and dict(broken) == dict(whole)


def test_the_backend(example, tmp_path):
    (entry,) = example("A backend").ENTRIES
    ((name, backend),) = entry.items()
    assert name == "short_messages"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    gradients = {}
    try:
        for kind in (Ddp, backend):
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 3)
            optimizer = torch.optim.AdamW(model.parameters())
            # Two workers by what it is told; the other one has nothing to add.
            run = kind(model, optimizer, World(size=2), TrainConfig())
            run.backward(model(torch.randn(2, 4)).square().sum(), last=True)
            run.add_up()
            gradients[kind] = model.weight.grad
            assert run.clip() > 0
            run.step()
            run.close()
    finally:
        torch.distributed.destroy_process_group()
    exact, rounded = gradients.values()
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=2**-8, atol=0)


def test_the_tracker(example, monkeypatch, tmp_path):
    module = example("A tracker")
    ((name, place),) = module.ENTRIES[0].items()
    assert place.endswith(f".{name}:JsonLines")
    add(monkeypatch, TRACKERS, {name: f"{module.__name__}:JsonLines"})
    settings = config().model_copy(
        update={"report": ReportConfig.model_construct(trackers=(name,))}
    )
    watched, said = Watched(tmp_path / "sweep"), []
    for live in (watched.first_life, watched.second_life):
        with Follower(watched.folder, settings, said.append):
            live()
    assert said == []
    lines = (tmp_path / "sweep" / "tracked.jsonl").read_text().splitlines()
    assert sum('"train/loss"' in line for line in lines) == 14 + 20
    assert sum('"status": "finished"' in line for line in lines) == 1


def test_every_example_is_run():
    headings = re.findall(r"^## (.+)$", PAGE, re.M)
    code = Path(__file__).read_text(encoding="utf-8")
    assert headings and all(f'example("{heading}")' in code for heading in headings)
