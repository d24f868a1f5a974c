"""The config models: what each rule accepts and refuses."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from raytune_vlm.config.data import SplitConfig
from raytune_vlm.config.distributions import Distribution
from raytune_vlm.config.evaluation import JUDGED_METRICS, METRIC_MODES
from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.config.lora import SCOPES, LoraConfig
from raytune_vlm.config.sweep import SweepConfig, flatten

SPACE = {"lora.rank": {"type": "choice", "values": [4, 8]}}


def experiment(**sections: Any) -> ExperimentConfig:
    data = {"sources": [{"type": "cord", "path": "a.parquet"}]}
    return ExperimentConfig.model_validate({"name": "x", "data": data, **sections})


def test_sections_are_frozen_and_strict() -> None:
    config = experiment()
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "y"
    with pytest.raises(ValidationError, match="Extra inputs"):
        experiment(nmae="y")
    with pytest.raises(ValidationError, match="finite"):
        experiment(train={"learning_rate": float("nan")})


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", ""])
def test_a_name_cannot_lead_out_of_its_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="pattern"):
        experiment(name=name)


@pytest.mark.parametrize("metric", METRIC_MODES)
def test_the_metric_knows_its_direction(metric: str) -> None:
    judge = {"base_url": "http://localhost:8000/v1", "model": "judge"}
    judged = {"judge": judge} if metric in JUDGED_METRICS else {}
    config = experiment(evaluation={"metrics": [metric], **judged})
    assert (config.metric, config.mode) == (metric, METRIC_MODES[metric])


def test_the_deciding_metric_must_be_computed() -> None:
    with pytest.raises(ValidationError, match=r"not among evaluation\.metrics"):
        experiment(sweep={"metric": "cer@micro"})


def test_scopes_have_one_order_and_no_unknown_name() -> None:
    assert LoraConfig(scope="vision+text").scope == "text+vision"
    assert LoraConfig(scope="vision+text").scopes == ("text", "vision")
    for wrong in ("txt", "text+text", ""):
        with pytest.raises(ValidationError, match="distinct names"):
            LoraConfig(scope=wrong)


def test_alpha_is_absolute_or_a_multiple_of_the_rank() -> None:
    assert LoraConfig(rank=8, alpha_ratio=4).alpha_of("text") == 32
    assert LoraConfig(rank=8, alpha=5).alpha_of("text") == 5
    with pytest.raises(ValidationError, match="exclude each other"):
        LoraConfig(alpha=5, alpha_ratio=4)


def test_a_scope_has_its_own_rank_and_alpha() -> None:
    config = LoraConfig.model_validate({"rank": 8, "rank_by_scope": {"vision": 2}})
    assert [config.rank_of(scope) for scope in SCOPES] == [8, 8, 2]
    assert [config.alpha_of(scope) for scope in SCOPES] == [16, 16, 4]
    assert config.model_copy(update={"alpha": 5.0}).alpha_of("vision") == 5


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"lora": {"rank_by_scope": {"vision": 2}}},
            r"lora\.rank_by_scope\.vision=2 has no effect",
        ),
        (
            {"train": {"learning_rate_by_scope": {"projector": 1e-3}}},
            r"learning_rate_by_scope\.projector=0\.001 has no effect.*nor in lora\.modules_to_save",
        ),
        ({"lora": {"modules_to_save": "text"}}, "'text' is either trained in full or adapted"),
        ({"lora": {"modules_to_save": "head"}}, "distinct names of text"),
        ({"lora": {"init": "pissa", "dora": True}}, "dora=true and init=pissa exclude"),
        ({"lora": {"init": "orthogonal", "rank": 3}}, "needs an even rank, but text has rank 3"),
        ({"lora": {"loraplus_ratio": 0.5}}, "greater than or equal to 1"),
        ({"model": {"quantization": "nf4"}}, r"needs a GPU, but train\.gpus_per_worker=0"),
        (
            {
                "model": {"quantization": "nf4"},
                "train": {"gpus_per_worker": 1},
                "lora": {"init": "olora"},
            },
            "needs the weights themselves",
        ),
        (
            {
                "model": {"quantization": "nf4"},
                "train": {"gpus_per_worker": 1},
                "lora": {"scope": "vision", "modules_to_save": "text"},
            },
            "4-bit weights cannot be trained",
        ),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(sections: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        experiment(**sections)


def test_a_rank_of_a_scope_that_some_trial_adapts_is_allowed() -> None:
    scope = {"lora.scope": {"type": "choice", "values": ["text", "text+vision"]}}
    config = experiment(
        lora={"rank_by_scope": {"vision": 2}, "modules_to_save": "projector"},
        train={"learning_rate_by_scope": {"vision": 1e-4, "projector": 1e-5}},
        sweep={"search_space": scope},
    )
    assert config.with_recipe({"lora.scope": "text"}).lora.rank_of("vision") == 2
    changed = config.with_recipe({"lora.rank_by_scope.vision": 4})
    assert changed.lora.rank_of("vision") == 4
    assert changed.train.peak_of("vision") == 1e-4 and changed.train.peak_of("text") == 1e-3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_size": 1, "num_workers": 2}, "at least num_workers=2"),
        ({"max_steps": 10, "warmup_steps": 10}, "must be below max_steps=10"),
    ],
)
def test_train_rules(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        experiment(train=train)


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(ValidationError, match="below 1"):
        SplitConfig(select=0.5, report=0.5)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"type": "uniform", "lower": 2, "upper": 1}, "lower < upper"),
        ({"type": "loguniform", "lower": 0, "upper": 1}, "above 0"),
        ({"type": "quniform", "lower": 0, "upper": 1, "q": 0.3}, "multiple of q"),
        ({"type": "choice", "values": [1, 1]}, "distinct"),
        ({"type": "choice", "values": []}, "at least 1"),
        ({"type": "randint", "lower": 0.5, "upper": 3}, "integer"),
    ],
)
def test_distributions_refuse(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter[Any](Distribution).validate_python(plain)


@pytest.mark.parametrize(
    ("plain", "ends"),
    [
        ({"type": "randint", "lower": 2, "upper": 5}, (2, 4)),
        ({"type": "uniform", "lower": 2, "upper": 5}, (2, 5)),
        ({"type": "quniform", "lower": 2, "upper": 8, "q": 2}, (2, 8)),
        ({"type": "choice", "values": ["b", "a"]}, ("b", "a")),
    ],
)
def test_corners_start_and_end_at_the_ends(plain: dict[str, Any], ends: tuple[Any, Any]) -> None:
    corners = TypeAdapter[Any](Distribution).validate_python(plain).corners()
    assert (corners[0], corners[-1]) == ends


def test_a_grid_must_fit_into_the_trials() -> None:
    space = {"lora.rank": {"type": "grid", "values": [1, 2, 3]}}
    space["lora.dora"] = {"type": "choice", "values": [True, False]}
    grid: dict[str, Any] = {"searcher": {"type": "grid"}, "search_space": space}
    SweepConfig.model_validate({**grid, "num_trials": 7})
    SweepConfig.model_validate({**grid, "num_trials": 6, "include_default": False})
    with pytest.raises(ValidationError, match=r"num_trials=5 .* 6 combinations \(3 x 2\)"):
        SweepConfig.model_validate({**grid, "num_trials": 5})


def test_grid_distributions_and_grid_searchers_go_together() -> None:
    with pytest.raises(ValidationError, match=r"needs searcher\.type=grid"):
        SweepConfig.model_validate({"search_space": {"lora.rank": {"type": "grid", "values": [1]}}})
    uniform = {"lora.dropout": {"type": "uniform", "lower": 0, "upper": 0.5}}
    with pytest.raises(ValidationError, match="grid and choice only, got uniform"):
        SweepConfig.model_validate({"searcher": {"type": "grid"}, "search_space": uniform})


def test_the_first_rung_must_be_reached() -> None:
    asha = {"type": "asha", "grace_period": 300}
    with pytest.raises(ValidationError, match=r"grace_period=300 .* train.max_steps=200"):
        experiment(sweep={"scheduler": asha, "search_space": SPACE})
    experiment(sweep={"scheduler": asha})  # nothing is searched, nothing is stopped
    experiment(
        sweep={"scheduler": {"type": "fifo"}, "search_space": SPACE}, train={"max_steps": 20}
    )


def test_a_median_rule_needs_scores_on_the_way() -> None:
    median = {"type": "median", "grace_period": 20}
    with pytest.raises(ValidationError, match=r"evaluation\.every=None .* at their end only"):
        experiment(sweep={"scheduler": median, "search_space": SPACE})
    experiment(sweep={"scheduler": median, "search_space": SPACE}, evaluation={"every": 20})


@given(
    grace=st.integers(1, 50),
    factor=st.floats(1.1, 5),
    max_steps=st.integers(50, 500),
    every=st.none() | st.integers(1, 60),
)
def test_rungs_are_ordered_and_end_with_the_last_step(
    grace: int, factor: float, max_steps: int, every: int | None
) -> None:
    sweep = SweepConfig.model_validate(
        {"scheduler": {"type": "asha", "grace_period": grace, "reduction_factor": factor}}
    )
    rungs = sweep.rungs(max_steps, every)
    assert list(rungs) == sorted(set(rungs))
    assert rungs[0] <= min(grace, max_steps)
    assert rungs[-1] == max_steps


def test_a_recipe_changes_what_it_names_and_is_validated() -> None:
    config = experiment(lora={"rank": 4})
    changed = config.with_recipe({"lora.rank": 8, "lora.alpha": 32, "train.batch_size": 2})
    found = (changed.lora.rank, changed.lora.alpha_of("text"), changed.train.batch_size)
    assert found == (8, 32, 2)
    assert config.lora.rank == 4
    assert changed.with_recipe({"lora.rank": 4}).lora.alpha == 32
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        config.with_recipe({"lora.rank": 0})


def test_the_fingerprint_is_of_what_determines_results() -> None:
    config = experiment()
    assert config.fingerprint() == experiment(name="y", storage_path="elsewhere").fingerprint()
    assert config.fingerprint() != experiment(seed=1).fingerprint()
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_flatten_joins_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1]}) == {"a.b.c": 1, "d": [1]}
