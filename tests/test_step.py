"""The training step where memory or numbers fail it, and what it says of itself."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from made import experiment
from ranks import start_ranks
from safetensors.torch import load_file
from step_worker import short_of_memory, train

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import InfrastructureError, TrialDiverged, TrialInfeasible
from raytune_vlm.models.loading import load_base
from raytune_vlm.records import read_json
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.step_metrics import merged
from raytune_vlm.train.world import World

TRAIN = {"max_steps": 12, "warmup_steps": 2, "batch_size": 8, "micro_batch_size": 8}


@pytest.fixture
def opened(tiny_base, tiny_split):
    """A run as a context manager."""

    @contextmanager
    def begin(model_type="idefics3", *, base=None, lora=None, limit_file=None, **train):
        config = experiment(lora={"rank": 4, **(lora or {})}, train={**TRAIN, **train})
        base = base or tiny_base(model_type)
        data = TrainingData("d")
        run = Run(base, tiny_split(model_type), config, World(), data, limit_file=limit_file)
        try:
            yield run
        finally:
            run.close()

    return begin


def adapter(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model_type", ["idefics3", "qwen2_5_vl"])
def test_a_step_out_of_memory_is_that_of_a_smaller_micro_batch(
    model_type, opened, tiny_base, tmp_path
):
    with opened(model_type, lora={"dropout": 0.2}, micro_batch_size=2) as run:
        expected = [run.step().loss for _ in range(3)]
        weights = adapter(run)
    file = tmp_path / "micro_batch.json"
    with opened(model_type, lora={"dropout": 0.2}, limit_file=file) as run:
        with short_of_memory(tiny_base(model_type).model, rows=3):
            steps = [run.step() for _ in range(3)]
        assert [step.loss for step in steps] == expected
        assert same(weights, adapter(run))
        assert steps[0].micro_batch_size == 2 and steps[0].fed_tokens >= steps[0].tokens
        assert [note.partition(" (")[0] for note in run.auditor.notes] == [
            "step 1: out of memory: micro-batch 8 -> 4, at the same batch_size",
            "step 1: out of memory: micro-batch 4 -> 2, at the same batch_size",
        ]
        run.save(tmp_path / "step_000003")
        following = run.step().loss
    assert read_json(file) == {"size": 2, "tokens": None}
    assert read_json(tmp_path / "step_000003/state.json")["micro_batch"] == read_json(file)
    with opened(model_type, lora={"dropout": 0.2}) as run:  # by the checkpoint alone
        run.restore(tmp_path / "step_000003")
        assert run.step().loss == following and run.batches.limit.size == 2
    with opened(model_type, limit_file=file) as run:  # by the file alone
        assert run.batches.limit.size == 2


def test_the_limit_of_tokens_is_halved_too_and_one_row_is_the_end(opened, tiny_base):
    with opened(micro_batch_tokens=4096) as run, short_of_memory(tiny_base("idefics3").model, 0):
        with pytest.raises(TrialInfeasible, match="out of memory at step 1 with a single row"):
            run.step()
        assert run.batches.limit.size == 1 and run.batches.limit.tokens == 512
        assert run.steps_done == 0


def test_a_sharded_rank_leaves_the_smaller_micro_batch_behind(tiny_base, tiny_split, tmp_path):
    base, file = tiny_base("idefics3"), tmp_path / "micro_batch.json"
    config = experiment(train={**TRAIN, "backend": "fsdp2", "num_workers": 2})
    run = Run(base, tiny_split("idefics3"), config, World(), TrainingData("d"), limit_file=file)
    try:
        with short_of_memory(base.model, 3), pytest.raises(InfrastructureError, match="rank 0"):
            run.step()
    finally:
        run.close()
    assert read_json(file) == {"size": 4, "tokens": None}


def test_two_workers_of_which_one_is_out_of_memory(tiny_base, tiny_split, tiny_model, tmp_path):
    split = tiny_split("idefics3")
    store = Path(split._store)
    jobs = {"model": str(tiny_model("idefics3")), "store": str(store), "train": TRAIN}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = start_ranks(2, "step_worker.py", tmp_path / "jobs.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["short"]["losses"] == found["small"]["losses"]
    assert found["short"]["micro_batch_size"] == 2
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in found)
    assert same(first, second)
    alone = train(jobs, World(), tmp_path / "alone")
    assert found["short"]["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def test_a_batch_that_is_not_finite_is_named(opened):
    with opened() as run:
        run.step()
        poisoned = next(p for p in run.model.parameters() if p.requires_grad)
        with torch.no_grad():
            poisoned.fill_(float("nan"))
        ids = [run._split.sample_ids[row] for row in run.plan.rows(1)]
        metrics = [run.step() for _ in range(3)]
        assert [entry.skipped_steps for entry in metrics] == [1, 2, 3]
        named = f"samples {', '.join(ids[:5])} and 3 more"
        assert run.auditor.notes[0].startswith("no update at step 2: loss nan and gradient norm")
        assert run.auditor.notes[0].endswith(named)
        with pytest.raises(TrialDiverged, match=r"not finite; step 5: loss nan .* samples s\d+, s"):
            run.step()


@pytest.fixture(scope="module")
def half(tiny_model):
    return load_base(ModelConfig(name=str(tiny_model("qwen2_5_vl")), dtype="float16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_trained_is_float32_and_learns(dtype, opened, tiny_model):
    base = load_base(ModelConfig(name=str(tiny_model("qwen2_5_vl")), dtype=dtype))
    lora = {"scope": "text+vision", "modules_to_save": "projector"}
    with opened("qwen2_5_vl", base=base, lora=lora, learning_rate=1e-2) as run:
        trained = [p for p in run.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        frozen = [p for p in run.model.parameters() if not p.requires_grad]
        assert getattr(torch, dtype) in {p.dtype for p in frozen}
        losses = [run.step().loss for _ in range(6)]
        assert losses[-1] < losses[0]


def test_float16_has_the_gradients_of_float32(opened, half, tmp_path):
    with opened("qwen2_5_vl") as run:
        expected = [run.step() for _ in range(3)]
    with opened("qwen2_5_vl", base=half) as run:
        found = [run.step() for _ in range(3)]
        assert [step.grad_norm for step in found] == pytest.approx(
            [step.grad_norm for step in expected], rel=2e-2
        )
        run.save(tmp_path / "step_000003")
    state = json.loads((tmp_path / "step_000003/state.json").read_text())
    assert state["scaler"]["scale"] == 65536 and state["scaler"]["_growth_tracker"] == 3


def test_a_scale_that_overflows_is_no_divergence_and_is_kept(opened, half, tmp_path):
    def finite_steps(run, count):
        return [run.step() for _ in range(count)]

    with opened("qwen2_5_vl", base=half) as run:
        run.save(tmp_path / "step_000000")
    file = tmp_path / "step_000000/state.json"
    with opened("qwen2_5_vl", base=half) as run:
        run._backend.restore_scaler({**read_json(file)["scaler"], "scale": 2.0**24})
        steps = finite_steps(run, 12)
        lowered = sum(step.skipped for step in steps)
        assert lowered > 3, "more than would be a divergence"
        assert [step.overflowed_steps for step in steps][-1] == lowered
        assert steps[-1].skipped_steps == 0 and not steps[-1].skipped
        assert all(math.isfinite(step.loss) for step in steps)
        run.save(tmp_path / "step_000012")
    with opened("qwen2_5_vl", base=half) as run:
        run.restore(tmp_path / "step_000012")
        state = read_json(tmp_path / "step_000012/state.json")
        assert state["scaler"]["scale"] == 2.0 ** (24 - lowered)
        assert run._backend.scaler_state() == state["scaler"]
        assert state["overflowed_steps"] == lowered


def test_a_step_says_what_it_was(opened, tiny_split):
    split = tiny_split("idefics3")
    with opened(micro_batch_size=3) as run:
        steps = [run.step() for _ in range(3)]
    for number, step in enumerate(steps):
        rows = run.plan.rows(number)
        assert step.tokens == split.lengths[rows].sum() and step.images == step.samples == 8
        assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
        assert step.labelled_share == split.num_labelled[rows].sum() / step.tokens
        assert step.padding_share == pytest.approx(1 - step.tokens / step.fed_tokens)
        assert 0 < step.padding_share < 1 and 0 < step.data_wait_share < 1
        assert step.mfu is None and step.peak_memory_bytes > 10**8
    line = merged(steps)
    seconds = sum(step.seconds for step in steps)
    assert line.images_per_second == line.samples_per_second == pytest.approx(24 / seconds)
    assert (line.step, line.loss) == (3, steps[-1].loss)
    wait = sum(step.data_wait_share * step.seconds for step in steps)
    assert line.data_wait_share == pytest.approx(wait / seconds)
