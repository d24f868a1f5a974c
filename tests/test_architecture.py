"""Imports go one way, modules stay small, and the config costs no heavy import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_MODULE = 400


def test_imports_go_one_way() -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_too_long() -> None:
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "raytune_vlm").rglob("*.py")
        if (lines := path.read_text(encoding="utf-8").count("\n")) > LONGEST_MODULE
    }
    assert not too_long, f"make a package of: {too_long}"


@pytest.mark.parametrize(
    "module", ["config.loader", "config.schema", "records", "errors", "json_tokens"]
)
def test_it_imports_without_the_heavy_libraries(module: str) -> None:
    code = (
        f"import sys, raytune_vlm.{module}\n"
        "print(*({'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_no_two_test_files_have_one_name():
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest takes one of them for the other"


def test_a_shared_folder_whose_writer_fails_is_not_there_for_the_next(made_once):
    def fails(folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        made_once("written-twice", fails)
    whole = made_once("written-twice", lambda folder: folder.mkdir())
    assert not list(whole.iterdir())
    assert made_once("written-twice", fails) == whole
