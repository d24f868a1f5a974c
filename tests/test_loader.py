"""Reading experiments: every mistake is one line that says where, what, and what was meant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.loader import load_experiment, render
from raytune_vlm.config.yaml_lines import read_yaml, write_yaml
from raytune_vlm.errors import ConfigError

BASE = """\
name: x
data:
  sources:
    - {type: cord, path: a.parquet}
    - type: image_text
      path: b
lora:
  rank: 8
train:
  batch_size: 4
  max_steps: 100
  warmup_steps: 5
sweep:
  searcher:
    type: tpe
    num_startup_trials: 3
  search_space:
    lora.rank: {type: choice, values: [4, 8]}
    train.learning_rate: {type: loguniform, lower: 1e-4, upper: 1e-2}
"""
TOKEN = "hf_" + "abcdefghij" * 3 + "1234"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str = BASE, *overrides: str) -> ExperimentConfig:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load_experiment("x.yaml", overrides)


def problem(text: str = BASE, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_status == 2
    return caught.value.message


def changed(old: str, new: str) -> str:
    assert old in BASE
    return BASE.replace(old, new, 1)


def space(entry: str) -> str:
    return changed("lora.rank: {type: choice, values: [4, 8]}", entry)


# --- files ---------------------------------------------------------------------------------------


def test_a_good_file_is_read_with_numbers_as_people_write_them() -> None:
    config = load(changed("batch_size: 4", "learning_rate: 1e-4"))
    assert config.train.learning_rate == 1e-4
    assert config.train.batch_size == 16
    assert [source.type for source in config.data.sources] == ["cord", "image_text"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml: is empty"),
        ("# only a comment\n", "x.yaml: is empty"),
        ("- 1\n", "x.yaml: the top level must be a mapping of keys, got a list"),
        ("3\n", "x.yaml: the top level must be a mapping of keys, got a single value"),
        ("name: [\n", "not valid YAML"),
        ("a: 1\nb: c: d\n", "x.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a:\n\tb: 1\n", "x.yaml:2: tab in the indentation; YAML wants spaces"),
        ("a: 1\n---\nb: 1\n", "expected a single document"),
        ("a: &x 1\nb: *x\n", "x.yaml:2: not valid YAML: anchors and aliases are not allowed"),
        ("a: !!python/object:os.system x\n", "x.yaml:1: not valid YAML: tag"),
        ("1: 2\n", "x.yaml:1: key '1' must be text; put it in quotes"),
        ("? [a]\n: 1\n", "x.yaml:1: a key must be text"),
        ("a: \x01\n", "x.yaml:1: character '\\x01' is not allowed"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_files_that_are_no_experiment(text: str, message: str) -> None:
    told = problem(text)
    assert message in told
    assert "\n" not in told


def test_a_duplicate_key_is_refused() -> None:
    told = problem(changed("batch_size: 4", "batch_size: 4\n  batch_size: 5"))
    assert told == "x.yaml:11: train.batch_size: duplicate key, first given in line 10"


def test_files_that_cannot_be_read() -> None:
    Path("demo.yaml").write_text(BASE, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"demp.yaml: no such file \(did you mean 'demo.yaml'\?"):
        load_experiment("demp.yaml")
    with pytest.raises(ConfigError, match=r"nowhere/x.yaml: no such file$"):
        load_experiment("nowhere/x.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_experiment(Path())
    Path("latin.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_experiment("latin.yaml")


# --- keys and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size", "batch_sise",
         "x.yaml:10: train.batch_sise: unknown key (did you mean 'batch_size'?)"),
        ("train:", "trian:", "x.yaml:9: trian: unknown key (did you mean 'train'?)"),
        ("path: b", "pth: b",
         "x.yaml:6: data.sources.1.pth: unknown key (did you mean 'path'?)"),
        ("path: b", "path: b\n      image_colum: c",
         "x.yaml:7: data.sources.1.image_colum: unknown key (did you mean 'image_column'?)"),
        ("type: cord,", "type: cord, cord: 1,", "x.yaml:4: data.sources.0.cord: unknown key"),
        ("batch_size: 4", "batch_size: 0",
         "x.yaml:10: train.batch_size: Input should be greater than or equal to 1, got 0"),
        ("batch_size: 4", "schedule: linaer",
         "got 'linaer' (did you mean 'linear'?)"),
        ("train:\n", "train: 3\nmodel:\n", "x.yaml:9: train: Input should be a mapping of keys"),
        ("type: cord", "type: crod",
         "x.yaml:4: data.sources.0.type: unknown type 'crod' (did you mean 'cord'?); known: "),
        ("type: cord, ", "", "x.yaml:4: data.sources.0: type is missing; known: cord, image_text"),
        ("path: b", "split: train", "x.yaml:5: data.sources.1.path: this key is required"),
        ("name: x\n", "", "x.yaml: name: this key is required and missing"),
        ("rank: 8", "scope: txt", "x.yaml:8: lora.scope: 'txt' must be distinct names"),
        ("warmup_steps: 5", "warmup_steps: 100",
         "x.yaml:12: train: warmup_steps=100 must be below max_steps=100"),
        ("rank: 8", "alpha: 4\n  alpha_ratio: 2.0",
         "x.yaml:9: lora.alpha_ratio: is not used when alpha is set"),
        ("rank: 8", "alpha: 4\n  alpha_ratio: 3.0", "lora: alpha=4.0 and alpha_ratio=3.0 exclude"),
        ("sweep:\n", "evaluation: {metrics: []}\nsweep:\n", "must be distinct and at least one"),
        ("sweep:\n", "evaluation: {metrics: 3}\nsweep:\n", "Input should be a list, got 3"),
        ("sweep:\n", "evaluation: {metrics: [cer@mikro]}\nsweep:\n", "did you mean 'cer@micro'?"),
        ("sweep:\n", "sweep:\n  metric: cer@micro\n", "x.yaml:14: sweep.metric='cer@micro'"),
        ("max_steps: 100", "max_steps: 40",
         "sweep.scheduler.grace_period=50 must be at most train.max_steps=40"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_helps(old: str, new: str, message: str) -> None:
    told = problem(changed(old, new))
    assert message in told
    assert told.startswith("x.yaml")


def test_all_problems_are_told_at_once() -> None:
    text = changed("batch_size: 4", "batch_sise: 4").replace("rank: 8", "rank: 0", 1)
    assert problem(text).splitlines() == [
        "x.yaml:8: lora.rank: Input should be greater than or equal to 1, got 0",
        "x.yaml:10: train.batch_sise: unknown key (did you mean 'batch_size'?)",
    ]


# --- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.learning_rate=3e-3", lambda c: c.train.learning_rate == 3e-3),
        ("data.sources.0.path=z", lambda c: c.data.sources[0].path == "z"),
        ("data.sources=[{type: sroie, path: s}]", lambda c: len(c.data.sources) == 1),
        ("model.revision=", lambda c: c.model.revision is None),
        ("evaluation.metrics=[cer@micro]", lambda c: c.metric == "cer@micro"),
        ("sweep.search_space={}", lambda c: not c.sweep.search_space),
        ("sweep.search_space.lora.rank.values=[2]",
         lambda c: c.sweep.search_space["lora.rank"].values == (2,)),
        ("sweep.search_space.lora.dora={type: choice, values: [true, false]}",
         lambda c: len(c.sweep.search_space) == 3),
        ("sweep.scheduler.grace_period=7", lambda c: c.sweep.scheduler.grace_period == 7),
    ],
)  # fmt: skip
def test_an_override_reaches_its_key(
    override: str, read: Callable[[ExperimentConfig], bool]
) -> None:
    assert read(load(BASE, override))


def test_switching_a_type_replaces_the_whole_mapping() -> None:
    assert load(BASE, "sweep.searcher.type=random").sweep.searcher.model_dump() == {
        "type": "random"
    }
    kept = load(BASE, "sweep.searcher.type=tpe").sweep.searcher
    assert kept.model_dump()["num_startup_trials"] == 3
    # The order on the command line does not matter: the type goes first.
    source = load(BASE, "data.sources.1.path=c", "data.sources.1.type=cord").data.sources[1]
    assert (source.type, source.path) == ("cord", "c")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=0", "Input should be greater than or equal to 1, got 0"),
        ("train.lerning_rate=1", "unknown key (did you mean 'learning_rate'?)"),
        ("data.augmentation.brightnes=1", "unknown key (did you mean 'brightness'?)"),
        ("sweep.stop_when_stable.trial=2", "unknown key (did you mean 'trials'?)"),
        (
            "sweep.search_space.lora.dora={type: choice, valus: [true]}",
            "valus: unknown key (did you mean 'values'?)",
        ),
        ("sweep.slots=atuo", "should be integer at least 1, at most 256 or 'auto', got 'atuo'"),
        ("sweep.slots=0", "Input should be integer at least 1, at most 256 or 'auto', got 0"),
        ("evaluation.rung_samples=[half]", "Input should be number or list of: number"),
        ("evaluation.rung_samples={a: 1}", "Input should be number or list of: number"),
        ("train.gpus_per_worker=1.5", "gpus_per_worker=1.5 must be a whole number, or below 1"),
        ("train.gpus_per_worker=1e-5", "is too little: the least that Ray counts is 0.0001"),
        ("train.cpus_per_worker=1e-320", "is too little: the least that Ray counts is 0.0001"),
        ("trian.batch_size=1", "trian: unknown key (did you mean 'train'?)"),
        ("train.batch_size", "must be dotted.key=value"),
        ("=3", "'' is not a dotted key"),
        ("a..b=3", "'a..b' is not a dotted key"),
        ("train.batch_size=[1", "not valid YAML"),
        ("train.batch_size.x=1", "train.batch_size is 4, not a mapping of keys"),
        ("train=3", "Input should be a mapping of keys, got 3"),
        ("data.sources.5.path=z", "data.sources is a list of 2 (0 to 1), got '5'"),
        ("data.sources.first.path=z", "data.sources is a list of 2 (0 to 1), got 'first'"),
        ("evaluation.metrics.0=cer@micro", "is a list that the file does not set; give it whole"),
        ("data.sources.1.type=cord", "data.sources.1.path: this key is required and missing"),
        ("data.sources.1.type=crod", "unknown type 'crod' (did you mean 'cord'?)"),
        ("sweep.searcher.type=rndom", "unknown type 'rndom' (did you mean 'random'?)"),
        ("train.max_steps=5", "train: warmup_steps=5 must be below max_steps=5"),
        ("sweep.metric=cer@micro", "sweep.metric='cer@micro' is not among evaluation.metrics"),
        ("sweep.search_space.lora.rank.values=[1,0]", "lora.rank: value 0 is not valid"),
        ("sweep.search_space.lora.rnk={type: choice, values: [1]}", "did you mean 'lora.rank'?"),
    ],
)
def test_an_overrides_mistake_names_the_override(override: str, message: str) -> None:
    told = problem(BASE, override)
    assert told.startswith(f"override {override}: ")
    assert message in told


def test_an_override_given_twice_is_refused() -> None:
    assert "train.batch_size is given twice" in problem(
        BASE, "train.batch_size=1", "train.batch_size=2"
    )


# --- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["api_key", "token", "hf_token", "password", "client_secret"])
def test_keys_that_name_secrets_are_refused(key: str) -> None:
    told = problem(changed("name: x", f"name: x\n{key}: hunter2"))
    assert told.startswith(f"x.yaml:2: {key}: looks like a secret")
    assert "environment variable" in told
    assert "hunter2" not in told
    told = problem(BASE, f"model.{key}=hunter2")
    assert "looks like a secret" in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    "value", [TOKEN, "sk-" + "a1" * 16, "ghp_" + "a1" * 15, "s3://user:pass@bucket/x"]
)
def test_values_that_are_secrets_are_refused_and_not_repeated(value: str) -> None:
    told = problem(changed("path: b", f"path: '{value}'"))
    assert told.startswith("x.yaml:6: data.sources.1.path: the value looks like a secret")
    assert value not in told
    told = problem(BASE, f"data.sources.1.path={value}")
    assert "looks like a secret" in told
    assert value not in told


def test_harmless_names_are_no_secrets() -> None:
    config = load(
        changed("path: b", "path: hf://datasets/task-12345678901234567890/hf_data"),
        "evaluation.max_new_tokens=9",
        "evaluation.answer=json_tags",
    )
    assert config.evaluation.max_new_tokens == 9


# --- the search space ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lora.rnk: {type: choice, values: [4]}",
         "lora.rnk: no such key in the experiment (did you mean 'lora.rank'?)"),
        ("train.max_steps: {type: choice, values: [4]}", "the executor is resident"),
        ("train.num_workers: {type: choice, values: [1]}", "the executor is resident"),
        ("data.max_length: {type: choice, values: [64]}", "only single keys under lora. and train"),
        ("seed: {type: choice, values: [1]}", "only single keys under lora. and train"),
        ("lora: {type: choice, values: [1]}", "only single keys under lora. and train"),
        ("sweep.metric: {type: choice, values: [a]}", "only single keys under lora. and train"),
        ("lora.rank: {type: choice, values: [4, 0]}",
         "lora.rank: value 0 is not valid: Input should be greater than or equal to 1"),
        ("lora.rank: {type: uniform, lower: 4, upper: 64}", "should be a valid integer"),
        ("lora.dropout: {type: uniform, lower: 0, upper: 1}", "value 1.0 is not valid"),
        ("lora.scope: {type: choice, values: [vision+text]}",
         "value 'vision+text' is read as 'text+vision'; write it so"),
        ("train.warmup_steps: {type: randint, lower: 0, upper: 101}",
         "value 100 is not valid: train: warmup_steps=100 must be below max_steps=100"),
        ("lora.rank: {type: chioce, values: [4]}", "(did you mean 'choice'?)"),
        ("lora.rank: {values: [4]}", "lora.rank: type is missing; known: choice, grid"),
        ("lora.rank: {type: choice, values: [true, 4]}", "value True is read as 1; write it so"),
        ("lora.dora: {type: choice, values: [0]}", "value 0 is read as False; write it so"),
        ("lora.rank: {type: choice, values: [4, 4.0]}", "values must be distinct, got [4, 4.0]"),
        ("lora.dropout: {type: quniform, lower: 0, upper: 0.5, q: 0.2}",
         "must be a multiple of q=0.2, got lower=0.0, upper=0.5"),
        ("lora.rank: {type: choice, values: []}", "should have at least one item, got none"),
        ("lora.rank: {type: choice, values: [[4]]}", "values.0: Input should be a number, a text"),
        ("lora.rank: [4, 8]", "lora.rank: Input should be a mapping of keys, got [4, 8]"),
        ("lora.rank: {type: grid, values: [4]}", "type grid needs searcher.type=grid"),
        ("lora.alpha: {type: choice, values: [4]}\n"
         "    lora.alpha_ratio: {type: choice, values: [2]}", "exclude each other"),
    ],
)  # fmt: skip
def test_a_bad_search_space_is_refused_at_its_line(entry: str, message: str) -> None:
    told = problem(space(entry))
    assert told.startswith("x.yaml:18: ")
    assert message in told
    assert "\n" not in told


def test_a_search_space_cannot_contradict_the_experiment() -> None:
    text = changed("rank: 8", "rank: 8\n  alpha: 4")
    entry = "lora.alpha_ratio: {type: choice, values: [1, 3]}"
    told = problem(text.replace("lora.rank: {type: choice, values: [4, 8]}", entry))
    assert told.startswith("x.yaml:19: sweep.search_space.lora.alpha_ratio: value 1 is not valid")


def test_values_that_are_valid_alone_must_be_valid_in_pairs() -> None:
    entry = (
        "lora.init: {type: choice, values: [pissa, default]}\n"
        "    lora.dora: {type: choice, values: [false, true]}"
    )
    assert problem(space(entry)).startswith(
        "x.yaml:18: sweep.search_space.lora.init: lora.init=pissa, lora.dora=True are not valid "
        "together: lora: dora=true and init=pissa exclude each other"
    )
    entry = "lora.rank: {type: randint, lower: 2, upper: 9}"
    assert "value 3 is not valid" in problem(space(entry), "lora.init=orthogonal")


def test_a_rank_of_one_scope_is_searched() -> None:
    entry = "lora.rank_by_scope.vision: {type: choice, values: [2, 4]}"
    config = load(space(entry), "lora.scope=text+vision")
    assert config.with_recipe({"lora.rank_by_scope.vision": 4}).lora.rank_of("vision") == 4
    assert "'vision' is not in lora.scope=text" in problem(space(entry))
    entry = "lora.rank_by_scope.visio: {type: choice, values: [2, 4]}"
    assert "did you mean 'lora.rank_by_scope.vision'?" in problem(space(entry))


def test_ends_that_are_valid_alone_must_be_valid_together(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ExperimentConfig.with_recipe

    def no_large_pair(self: ExperimentConfig, recipe: dict[str, Any]) -> ExperimentConfig:
        if recipe.get("lora.rank") == 8 and recipe.get("train.learning_rate") == 1e-2:
            raise ValidationError.from_exception_data("x", [{"type": "missing", "input": None}])
        return alone(self, recipe)

    monkeypatch.setattr(ExperimentConfig, "with_recipe", no_large_pair)
    assert problem().startswith(
        "x.yaml:18: sweep.search_space: all upper ends together "
        "(lora.rank=8, train.learning_rate=0.01) are not valid: "
    )


def test_a_grid_larger_than_the_trials_is_refused() -> None:
    text = changed("type: tpe\n    num_startup_trials: 3", "type: grid\n  num_trials: 3")
    text = text.replace(
        "{type: loguniform, lower: 1e-4, upper: 1e-2}", "{type: grid, values: [1, 2]}"
    )
    told = problem(text)
    assert told.startswith("x.yaml:16: ")
    assert "num_trials=3 is less than the grid's 4 combinations (2 x 2)" in told


def test_a_huge_grid_is_counted_and_not_made() -> None:
    keys = ("lora.dropout", "lora.alpha_ratio", "train.learning_rate", "train.weight_decay")
    listed = ", ".join(str(number / 1000) for number in range(1, 201))
    entries = [f"    {key}: {{type: grid, values: [{listed}]}}" for key in keys]
    entries.append("    lora.dora: {type: grid, values: [true, false]}")
    entries.append("    lora.rank: {type: grid, values: [2, 4, 8], when: {lora.dora: true}}")
    head = changed("type: tpe\n    num_startup_trials: 3", "type: grid")
    told = problem("\n".join([head[: head.index("    lora.rank: {")].rstrip(), *entries]) + "\n")
    assert f"less than the grid's {4 * 200**4} combinations and the experiment's own" in told


# --- rendering -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["seed=3", "lora.alpha=7", "name='1e5'", "model.revision='on'"]
)
def test_the_resolved_experiment_reads_back_as_the_same(override: str) -> None:
    config = load(BASE, override)
    assert load(render(config)) == config


text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff")
)
key = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(key, inner, max_size=4),
    max_leaves=12,
)


@given(plain_data)
def test_what_is_written_is_read_back(data: object) -> None:
    read, _ = read_yaml(write_yaml(data), "x")
    assert read == data


@given(
    st.sampled_from(["1e5", "1E-3", "010", "on", "no", "null", "~", "1_0", ".inf", "2026-01-31"])
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert read_yaml(write_yaml({"a": text}), "x")[0] == {"a": text}
