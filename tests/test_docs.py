"""What the documents say is true: their commands, keys, paths, snippets and links.

Where a command is written down, in a page, in the comment of a script or in a message of ours, the
real parser reads it. What needs neither Ray nor a GPU is then run on a small experiment and an
example sweep folder; the others name the test that runs them. A failure lists every file and line.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import documents
import pytest
from click.core import ParameterSource
from click.testing import CliRunner
from documents import PAGES, ROOT, Found, anchors, fences, links, spans
from made import write_data
from sweep_folder_example import build_example

from raytune_vlm import cli as command_line
from raytune_vlm.cli import cli
from raytune_vlm.cli_evaluate import KEYS, SERVED_KEYS
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.benchmark import Benchmark
from raytune_vlm.config.evaluation import METRIC_MODES
from raytune_vlm.config.loader import load_experiment, resolve
from raytune_vlm.config.schema import json_schema
from raytune_vlm.config.yaml_lines import read_yaml
from raytune_vlm.errors import ConfigError
from raytune_vlm.evaluate.benchmarks import find_benchmarks

RUN_BY = {
    "demo": "tests/test_docs.py::demo_data",
    "prepare": "tests/test_cli.py::test_bad_rows_are_named_and_leave_no_sweep_folder",
    "data label": "tests/test_label.py::test_a_killed_run_pays_for_nothing_twice",
    "data agree": "tests/test_agreement.py::test_what_differs_is_reviewed_on_a_page_and_comes_back",
    "train": "tests/integration/test_sweep.py::"
    "test_two_workers_that_stream_and_are_killed_do_what_one_undisturbed_does",
    "sweep": "tests/integration/test_sweep.py::"
    "test_a_sweep_killed_then_stopped_and_resumed_equals_the_undisturbed_one",
    "resume": "tests/integration/test_sweep.py::"
    "test_a_sweep_killed_then_stopped_and_resumed_equals_the_undisturbed_one",
    "resume --into": "tests/test_folder_copy.py::test_what_grows_and_what_goes_is_copied",
    "resume --address": "tests/integration/test_jobs.py::"
    "test_a_submitted_sweep_is_stopped_and_resumed_to_its_winner",
    "control": "tests/integration/test_controlled_sweep.py::"
    "test_a_sweep_does_what_it_is_told_while_it_runs",
    "evaluate": "tests/integration/test_sweep.py::"
    "test_two_workers_that_stream_and_are_killed_do_what_one_undisturbed_does",
    "evaluate --benchmarks": "tests/integration/test_evaluate_suite.py::"
    "test_a_model_on_every_benchmark_prints_the_card",
    "evaluate --benchmarks --adapter": "tests/test_benchmarks.py::"
    "test_an_adapter_is_put_on_the_base_and_taken_off_again",
    "evaluate --server": "tests/test_served.py::test_a_served_model_answers_as_our_own_engine_does",
    "export": "tests/test_export.py::test_the_command_line_writes_says_and_refuses",
    "export --format": "tests/test_export.py::"
    "test_a_merged_model_loads_with_transformers_and_generates_the_same",
    "submit": "tests/integration/test_jobs.py::"
    "test_a_submitted_sweep_is_stopped_and_resumed_to_its_winner",
    "stop": "tests/integration/test_jobs.py::"
    "test_a_submitted_sweep_is_stopped_and_resumed_to_its_winner",
    "doctor --address": "tests/test_doctor.py::test_dashboards_that_let_everybody_in",
}
"""A command, with options that make it another one -> the test that runs it, or what it calls."""

RUN_HERE = {
    "validate": {"EXPERIMENT.yaml": "small.yaml"},
    "data inspect": {"TARGET": "data/train.jsonl", "EXPERIMENT.yaml": "small.yaml"},
    "data stats": {"TARGET": "data/train.jsonl"},
    "data validate": {"TARGET": "data/train.jsonl"},
    "data export": {"TARGET": "small.yaml", "EXPERIMENT.yaml": "small.yaml"},
    "rescore": {"FOLDER": "runs/my-receipts"},
    "report": {"FOLDER": "runs/my-receipts", "PLACE": "runs/my-receipts"},
    "schema": {},
    "doctor": {},
    "status": {"FOLDER": "runs/my-receipts", "TARGET": "runs/my-receipts"},
    "logs": {"FOLDER": "runs/my-receipts", "TARGET": "runs/my-receipts"},
}
"""Commands that are run here, and what stands for the words in capitals; DIR is a new folder."""

NOT_KEYS = {
    "docs/moving.md": {
        "model.pretrained_model_name_or_path",
        "model.torch_dtype",
        "model.attn_implementation",
    },
    "docs/remote_code.md": {"model.trust_remote_code"},
    "docs/log.md": {"train.compile"},
}
"""Dotted words that look like keys of an experiment: other trainers', refused or gone ones."""

NOT_KEPT = ("constraints/locked.txt",)
"""Files that are made, and not part of the repository."""

EXPERIMENT = """
name: small
model: {name: demo}
data: {root: data, sources: [{type: messages, path: "*.jsonl"}]}
evaluation: {metrics: [field_f1@donut]}
sweep: {search_space: {lora.rank: {type: choice, values: [2, 4]}}}
"""


def hold(check: Callable[[Found], Iterable[str]], items: Iterable[Found]) -> None:
    """Fail with all that a check has to say, a line each with its file and line."""
    said = [f"{item}: {why}" for item in items for why in check(item)]
    assert not said, "\n" + "\n".join(said)


# Commands


def understood(command: Found) -> click.Context | str | None:
    """The command as the command line reads it, why it does not, or None if there is no telling.

    None: its name is in capitals, or a sentence names it without its arguments.
    """
    words = documents.words(command)
    read: list[click.Context] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Command, "invoke", lambda self, context: read.append(context))
        try:
            cli.main(words, prog_name="raytune-vlm", standalone_mode=False)
        except click.UsageError as error:
            if isinstance(error, click.BadParameter) and "does not exist" in error.message:
                return None  # a file of somebody's
            is_named = isinstance(error, click.MissingParameter) or len(words) == 1
            if words[0].isupper() or (is_named and not command.is_whole):
                return None
            return error.format_message()
    return read[-1]


def key_of(context: click.Context) -> tuple[str, set[str]]:
    """The command, such as `data export`, and the options that it is given."""
    given = {
        option.opts[0]
        for option in context.command.params
        if isinstance(option, click.Option)
        and context.get_parameter_source(str(option.name)) is not ParameterSource.DEFAULT
    }
    return context.command_path.partition(" ")[2], given


COMMANDS = {command: understood(command) for command in documents.commands()}
READ = {command: read for command, read in COMMANDS.items() if isinstance(read, click.Context)}
LINES = [line for page in PAGES for line in documents.shell_lines(page)]
SPANS = [span for page in PAGES for span in spans(page)]
FENCES = [fence for page in PAGES for fence in fences(page)]


def test_the_command_line_understands_every_command() -> None:
    assert len(READ) > 80
    hold(lambda command: [read] if isinstance(read := COMMANDS[command], str) else [], COMMANDS)


def test_what_commands_are_given_exists() -> None:
    def check(command: Found) -> Iterator[str]:
        given = READ[command].params
        overrides = [each for each in given.get("overrides", ()) if not each.endswith("key=value")]
        of_labels = "hosts" in given  # keys of a labelling file, which is no experiment
        for override in () if of_labels else overrides:
            yield from wrong_override(override)
        if names := given.get("benchmarks"):
            find_benchmarks(names)
            known = KEYS if given["server"] is None else SERVED_KEYS
            yield from {each.partition("=")[0] for each in overrides} - set(known)
        yield from set((given.get("metrics") or "cer@micro").split(",")) - set(METRIC_MODES)
        if (file := ROOT / str(given.get("experiment"))).parent.name == "experiments":
            try:
                load_experiment(file, overrides)
            except ConfigError as error:
                yield error.message

    hold(check, READ)


def test_every_command_is_run_by_a_test() -> None:
    def check(command: Found) -> Iterator[str]:
        name, options = key_of(READ[command])
        fitting = [
            entry
            for entry in (*RUN_BY, *RUN_HERE)
            if f"{name} ".startswith(f"{entry.partition(' --')[0]} ")
            and {f"--{option}" for option in entry.split(" --")[1:]} <= options
        ]
        if not fitting:
            yield f"no test runs {name} with {sorted(options)}: see RUN_BY and RUN_HERE"

    hold(check, READ)
    for test in set(RUN_BY.values()):
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), test


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `raytune-vlm demo` has written its data, twice, and swept nothing.

    A sweep is as any other; `make demo` runs it.
    """
    folder = tmp_path_factory.mktemp("demo")
    swept: list[ExperimentConfig] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(command_line, "_sweep", lambda experiment, _: swept.append(experiment))
        for _ in range(2):
            done = CliRunner().invoke(cli, ["demo", "sweep.num_trials=2"], catch_exceptions=False)
            assert done.exit_code == 0
            Path("runs/demo").mkdir(exist_ok=True)
    assert [experiment.name for experiment in swept] == ["demo", "demo-2"]
    for source in swept[0].data.sources:
        assert list((folder / swept[0].data.root).glob(source.path)), source
    return folder


def test_commands_without_ray_run(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pages; the tutorial's experiment and data are there as it says."""
    monkeypatch.chdir(demo_data)
    monkeypatch.setenv("COLUMNS", "100")
    (tutorial,) = [
        block for block in FENCES if block.text.startswith("name: my-receipts\nmodel: {name: demo}")
    ]
    Path("my-receipts.yaml").write_text(tutorial.text, encoding="utf-8")
    write_data(Path("data"), num_train=8, num_other=2)
    Path("small.yaml").write_text(EXPERIMENT, encoding="utf-8")
    for folder in ("docs", "experiments"):
        Path(folder).mkdir()
    build_example(Path("runs/my-receipts"), mode="min")
    runs: dict[tuple[str, ...], Found] = {}
    for command, context in READ.items():
        name, options = key_of(context)
        words = [RUN_HERE.get(name, {}).get(word, word) for word in documents.words(command)]
        if name in RUN_HERE and "--address" not in options:
            runs.setdefault(tuple(w for w in words if not w.endswith("key=value")), command)

    def check(command: Found) -> Iterator[str]:
        words = next(words for words, known in runs.items() if known is command)
        number = len(list(demo_data.iterdir()))
        done = CliRunner().invoke(cli, [w.replace("DIR", f"new{number}") for w in words])
        if done.exit_code not in ((0, 1) if words[0] == "doctor" else (0,)):
            yield f"{words}: {done.exception}\n{done.output}"

    assert {" ".join(words[: 1 + (words[0] == "data")]) for words in runs} == set(RUN_HERE)
    hold(check, runs.values())


# Keys of experiments


def nodes_of(key: str) -> list[dict[str, Any]]:
    """The schemas of what may stand under a dotted key, in any variant of its section."""
    found: list[dict[str, Any]] = [SCHEMA]
    for step in key.split("."):
        found = [
            variant
            for node in found
            for inner in (
                node.get("properties", {}).get(step.removesuffix("[]")),
                node.get("additionalProperties"),
                node.get("items") if step.isdigit() else None,
            )
            if isinstance(inner, dict)
            for variant in variants(inner)
        ]
    return found


def variants(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema itself, and what it refers to."""
    yield node
    if "$ref" in node:
        yield from variants(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    for inner in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from variants(inner)
    if "items" in node:
        yield from variants(node["items"])


SCHEMA = json_schema()
SECTIONS = [name for name in SCHEMA["properties"] if any("properties" in n for n in nodes_of(name))]
KEY = re.compile(rf"((?:{'|'.join(SECTIONS)})(?:\.[a-z0-9_]+(?:\[\])?)+)(?:(?:=|: )(.+))?")


def wrong_override(text: str) -> Iterator[str]:
    """Why an experiment could not be given this; capitals and paths stand for anything."""
    key, _, value = text.partition("=")
    if not nodes_of(key):
        yield f"{key} is no key"
    elif value and not re.search(r"[A-Z]{2}", value):
        plain, _ = read_yaml(EXPERIMENT, "")
        try:
            resolve(plain, [text])
        except ConfigError as error:
            if re.search("Input should|unknown", error.message):  # by itself, whatever else is set
                yield error.message


def test_keys_in_backticks_are_keys_of_an_experiment() -> None:
    def check(span: Found) -> Iterator[str]:
        name = str(span.file.relative_to(ROOT))
        found = KEY.fullmatch(span.text)
        if found is not None and found[1] not in NOT_KEYS.get(name, ()):
            yield from wrong_override(f"{found[1]}={found[2] or ''}")

    hold(check, SPANS)


def test_experiments_and_their_parts_load(tmp_path: Path) -> None:
    def check(block: Found) -> Iterator[str]:
        try:
            plain, _ = read_yaml(block.text, "block")
            if plain.keys() & {"prompt"}:
                Benchmark.model_validate(plain)
            elif plain.keys() >= {"name", "data"}:
                file = tmp_path / "whole.yaml"
                file.write_text(block.text, encoding="utf-8")
                load_experiment(file)
            else:
                at_top = plain.keys() <= ExperimentConfig.model_fields.keys()
                whole, _ = read_yaml(EXPERIMENT, "")
                resolve(merged(whole, plain if at_top else {"sweep": plain}))
        except ValueError as error:
            yield str(error)

    blocks = [block for block in FENCES if block.language == "yaml"]
    assert len(blocks) > 8
    hold(check, blocks)


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Mappings put together; what the other says holds."""
    both = {
        key: merged(one[key], value)
        if isinstance(value, dict) and isinstance(one.get(key), dict) and key != "search_space"
        else value
        for key, value in other.items()
    }
    return one | both


# Paths, links, other languages


def test_links_lead_to_files_and_headings() -> None:
    def check(link: Found) -> Iterator[str]:
        if "://" in link.text:
            return
        path, _, anchor = link.text.partition("#")
        file = (link.file.parent / path) if path else link.file
        if not file.exists():
            yield "there is no such file"
        elif anchor and anchor not in anchors(file):
            yield "there is no such heading"

    found = [link for page in PAGES for link in links(page)]
    assert len(found) > 50
    hold(check, found)


PATH = re.compile(r"(?<![\w/.:-])((?:[\w.-]+/)+[\w.-]*\w/?)(?:::(\w+))?(?![\w:*<])")


def test_files_that_are_named_exist() -> None:
    """What begins like a path of the repository or of the package is one."""
    tops = {".ci", "benchmarks", "constraints", "deploy", "docs", "experiments", "tests"}
    packages = {path.name for path in (ROOT / "raytune_vlm").iterdir() if path.is_dir()}

    def check(span: Found) -> Iterator[str]:
        for name, test in PATH.findall(span.text):
            top = name.partition("/")[0]
            near = [ROOT / name, ROOT / "raytune_vlm" / name]
            if name in NOT_KEPT:
                continue
            if top in tops | {"raytune_vlm"} or (top in packages and name.endswith(".py")):
                existing = [path for path in near if path.exists()]
                if not existing:
                    yield f"there is no {name}"
                elif test and f"def {test}(" not in existing[0].read_text(encoding="utf-8"):
                    yield f"there is no test {test} in {name}"

    hold(check, [*SPANS, *LINES])


def test_other_commands_of_ours_exist() -> None:
    """Scripts with their options, targets of make, extras of pip, tests by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)

    def check(found: Found) -> Iterator[str]:
        if script := re.match(r"(?:\S*/)?python ((?:benchmarks|deploy|tests)/\S+\.py)", found.text):
            source = (ROOT / script[1]).read_text(encoding="utf-8")
            yield from (o for o in re.findall(r" (--[\w-]+)", found.text) if f'"{o}"' not in source)
        asked = re.match(r"pytest .*?(\S+\.py).* -k (\w+)", found.text)
        if asked and asked[2] not in (ROOT / asked[1]).read_text(encoding="utf-8"):
            yield f"no test of {asked[1]} is called {asked[2]}"
        for group in re.findall(r"raytune-vlm\[([\w,]+)\]", found.text):
            yield from (f"no extra {extra}" for extra in group.split(",") if extra not in extras)
        if make := re.match(r"make ([\w-]+)", found.text):
            yield from () if make[1] in targets else (f"no target {make[1]}",)

    hold(check, [*SPANS, *LINES])


def test_snippets_of_json_and_python_can_be_read() -> None:
    def check(block: Found) -> Iterator[str]:
        try:
            json.loads(block.text) if block.language == "json" else compile(
                block.text, block.place, "exec"
            )
        except ValueError as error:
            yield str(error)
        except SyntaxError as error:
            yield str(error)

    hold(check, [block for block in FENCES if block.language in ("json", "python")])
