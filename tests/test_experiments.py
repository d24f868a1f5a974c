"""Every shipped experiment loads, explains itself, says nothing that is a default anyway."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.loader import load_experiment, render
from raytune_vlm.config.reference import markdown
from raytune_vlm.config.schema import json_schema, schema_text
from raytune_vlm.config.yaml_lines import read_yaml

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_are_experiments() -> None:
    assert FILES


def test_it_loads_and_its_resolved_form_is_the_same_experiment(file: Path, tmp_path: Path) -> None:
    experiment = load_experiment(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(render(experiment), encoding="utf-8")
    assert load_experiment(resolved) == experiment


def test_its_header_tells_what_one_has_to_know(file: Path) -> None:
    header = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))
    assert header, "no header comment"
    for word in (
        "Purpose",
        "Command",
        "raytune-vlm ",
        "Hardware",
        "Expected time",
        "Expected score",
    ):
        assert word in header.group(), f"the header does not say: {word}"


def test_it_says_only_what_differs_from_the_defaults(file: Path) -> None:
    plain, _ = read_yaml(file.read_text(encoding="utf-8"), file.name)
    whole = ExperimentConfig.model_validate(plain)
    superfluous = []
    for path in _leaves(plain):
        if path[-1] == "type" or "search_space" in path:
            continue
        without = copy.deepcopy(plain)
        parent = without
        for step in path[:-1]:
            parent = parent[step]
        del parent[path[-1]]
        try:
            same = ExperimentConfig.model_validate(without) == whole
        except ValidationError:
            same = False
        if same:
            superfluous.append(".".join(map(str, path)))
    assert not superfluous


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for index, item in enumerate(node):
            yield from _leaves(item, (*path, index))
    else:
        yield path


def test_the_schema_and_the_reference_are_the_generated_ones() -> None:
    page = FOLDER.parent / "docs" / "reference.md"
    shipped = (FOLDER / "schema.json").read_text(encoding="utf-8")
    assert shipped == schema_text(), "run: raytune-vlm schema > experiments/schema.json"
    assert page.read_text(encoding="utf-8") == markdown(), (
        "run: raytune-vlm schema --markdown > docs/reference.md"
    )
    for name in json_schema()["$defs"]["SweepConfig"]["properties"]:
        assert f"| `{name}` |" in markdown()


def test_every_key_of_the_schema_is_described() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    missing = [
        f"{section['title']}.{key}"
        for section in sections
        for key, value in section["properties"].items()
        if key != "type" and "description" not in value and "$ref" not in value
    ]
    assert not missing
    assert all("description" in section for section in sections)
    json.dumps(schema)
