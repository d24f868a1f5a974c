"""The README's map and tables are held against the files and the tables; see `test_docs.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raytune_vlm.cli import cli
from raytune_vlm.config.evaluation import METRIC_MODES
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.sources import SOURCES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "raytune_vlm"


def tree() -> list[str]:
    """Paths of the annotated tree, relative to the repository."""
    block = README.split("## The map")[1].split("```")[1]
    paths, parents = [], ""
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            paths.append(f"{parents}{name}")
        else:
            parents = name if name == "raytune_vlm/" else ""
            paths.append(name)
    return paths


def test_the_map_names_everything_that_is_there_and_nothing_else():
    named = set(tree())
    there = {
        f"raytune_vlm/{path.name}{'/' * path.is_dir()}"
        for path in PACKAGE.iterdir()
        if not path.name.startswith(("__", "."))
    }
    folders = {"raytune_vlm/", "experiments/", "deploy/", "benchmarks/", "docs/", "tests/"}
    assert named == there | folders


def test_the_five_files_to_read_first_exist():
    sentence = README.split("Read these five first:")[1].split("\n\n")[0]
    files = re.findall(r"`([^`]+\.py)`", sentence)
    assert len(files) == 5
    assert all((PACKAGE / file).is_file() for file in files)


def test_every_command_of_the_readme_exists_and_every_command_is_in_it():
    mentioned = set(re.findall(r"raytune-vlm ([a-z]+)", README))
    assert mentioned <= set(cli.commands)
    assert set(cli.commands) - {"demo"} <= mentioned
    targets = re.findall(r"^make ([a-z]+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("table", [SOURCES, METRIC_MODES])
def test_the_readme_names_every_source_and_metric(table):
    assert all(f"`{name}`" in README for name in table)


def test_the_readme_names_every_page():
    pages = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
    assert [page for page in pages if f"({page})" not in README] == []


def test_docs_list_every_family():
    listed = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in listed] == []


def test_docs_list_every_metric():
    listed = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRIC_MODES if f"| `{name}` |" not in listed] == []
