"""A TARGET of the command line -> an experiment: an experiment file, or data files on their own.

Data files become an experiment with nothing but `model` and `data`, so that overrides
(`data.max_length=4096`, `data.sources.0.instruction=read`) mean what they mean everywhere.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.config.yaml_lines import write_yaml
from raytune_vlm.errors import ConfigError, DataError, did_you_mean
from raytune_vlm.inspection.columns import SUFFIXES, columns_of
from raytune_vlm.inspection.detect import (
    SUFFIX_TYPES,
    Detected,
    check_type,
    detect_columns,
    detect_folder,
    detect_name,
    is_saved_dataset,
)
from raytune_vlm.inspection.text import line
from raytune_vlm.sources import SOURCES

MAX_FILES = 32
"""Of a folder or a glob, the columns of at most so many files are looked at."""


@dataclass(frozen=True)
class Target:
    """What is to be looked at, and how it is read."""

    name: str
    experiment: ExperimentConfig
    read_as: tuple[str, ...]
    """One line for each way in which files are read: `sharegpt (columns conversations, images)`."""
    left_out: tuple[str, ...] = ()
    """Files beside the data that are no data, and why."""


@dataclass(frozen=True)
class _Found:
    """A path with its type, as `data.sources` will have it."""

    path: str
    detected: Detected


def resolve_target(
    target: str, overrides: Sequence[str] = (), *, type_name: str | None, model: str | None
) -> Target:
    """The experiment that a TARGET stands for.

    Raises
    ------
    ConfigError, DataError
        If the experiment is wrong, there is nothing under that path, or its type cannot be told.
    """
    for text in overrides:
        if "=" not in text:
            raise ConfigError(
                f"{line(text)}: one TARGET at a time, then dotted.key=value; a glob goes in quotes"
            )
    models = () if model is None else (f"model.name={model}",)
    if target.lower().endswith((".yaml", ".yml")):
        if type_name is not None:
            raise ConfigError(
                f"--type {type_name}: the sources of {target} have types of their own"
            )
        experiment = load_experiment(target, (*overrides, *models))
        read_as = [f"{source.type} ({line(source.path)})" for source in experiment.data.sources]
        return Target(target, experiment, tuple(read_as))
    if type_name is not None:
        check_type(type_name)
    root, found, left_out = _find(target, type_name)
    ways: dict[str, int] = {}
    for entry in found:
        way = f"{entry.detected.type} ({entry.detected.seen})"
        ways[way] = ways.get(way, 0) + 1
    return Target(
        target,
        _experiment_of(line(target), root, found, (*overrides, *models)),
        tuple(way if len(ways) == 1 else f"{way}, {_files(count)}" for way, count in ways.items()),
        tuple(left_out),
    )


def _experiment_of(
    target: str, root: Path, found: list[_Found], overrides: Sequence[str]
) -> ExperimentConfig:
    sources = [
        {"type": entry.detected.type, "path": entry.path, **entry.detected.options}
        for entry in found
    ]
    plain = {"name": "inspection", "data": {"root": str(root), "sources": sources}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "target.yaml"
        try:
            file.write_text(write_yaml(plain), encoding="utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{line(root)}: the path is not UTF-8 text") from None
        try:
            return load_experiment(file, overrides)
        except ConfigError as error:  # it names a file that nobody has seen
            place = re.compile(re.escape(str(file)) + r"(:\d+)?")
            problems = place.sub(lambda _: target, error.message).split("\n")
            raise ConfigError(*problems) from None


def _find(target: str, type_name: str | None) -> tuple[Path, list[_Found], list[str]]:
    """The folder that names start from, the files or folders with their types, what is left out."""
    if "://" in target:
        raise ConfigError(
            f"{line(target)}: remote data needs an experiment with data.allow_network: true"
        )
    path = Path(target).expanduser().absolute()
    given = None if type_name is None else Detected(type_name, "--type")
    if path.is_dir():
        known = given or detect_folder(path)
        if known:
            return path, [_Found(str(path), known)], []
        if is_saved_dataset(path):
            return _saved_dataset(path, target)
        return _by_files(path, target, _files_in(path), whole=str(path))
    if path.is_file():
        known = given or detect_name(path)
        if known:
            return path.parent, [_Found(str(path), known)], []
        if not _is_data(path):
            suffixes = ", ".join(_suffixes())
            raise DataError(f"{line(target)}: has no supported suffix ({suffixes}); see --type")
        return _by_files(path.parent, target, [path], whole=str(path))
    if not glob.has_magic(target):
        raise DataError(_not_found(path))
    parts = path.parts
    root = Path(*parts[: next(place for place, part in enumerate(parts) if glob.has_magic(part))])
    if given:
        return root, [_Found(str(path), given)], []
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [file for file in matches if file.is_file() and _is_data(file)]
    return _by_files(root, target, files, whole=str(path))


def _saved_dataset(folder: Path, target: str) -> tuple[Path, list[_Found], list[str]]:
    """A folder that `save_to_disk` wrote: one source, whatever its splits."""
    files = sorted(folder.rglob("*.arrow"))[:1]
    _, found, _ = _by_files(folder, target, files, whole=str(folder))
    return folder, [_Found(str(folder), found[0].detected)], []


def _by_files(
    root: Path, target: str, files: list[Path], *, whole: str
) -> tuple[Path, list[_Found], list[str]]:
    """The types of the files: one source for all where they agree, else one a file."""
    if not files:
        raise DataError(
            f"{line(target)}: no data file ({', '.join(_suffixes())}) is there; "
            "a quoted glob such as 'data/**/*.parquet' reads subfolders"
        )
    found: list[_Found] = []
    left_out: list[str] = []
    for file in files[:MAX_FILES]:
        try:
            found.append(_Found(str(file), detect_name(file) or detect_columns(columns_of(file))))
        except DataError as error:
            left_out.append(f"{line(file.name)} {error.message}")
    if not found:
        raise DataError(
            f"{line(target)}: the source type cannot be told: {left_out[0]}; name it with "
            "--type NAME, and its columns with data.sources.0.NAME_column=..."
        )
    same = all(entry.detected == found[0].detected for entry in found)
    if same and not left_out:
        return root, [_Found(whole, found[0].detected)], []
    if len(files) > MAX_FILES:
        raise DataError(
            f"{line(target)}: {len(files)} files that are not alike: "
            f"{left_out[0] if left_out else _contrast(found)}; give a glob or --type NAME"
        )
    return root, found, left_out


def _contrast(found: list[_Found]) -> str:
    other = next(entry for entry in found if entry.detected != found[0].detected)
    return " but ".join(
        f"{line(Path(entry.path).name)} fits {entry.detected.type} ({entry.detected.seen})"
        for entry in (found[0], other)
    )


def _files_in(folder: Path) -> list[Path]:
    names = (file for file in folder.iterdir() if not file.name.startswith((".", "_")))
    return sorted(file for file in names if file.is_file() and _is_data(file))


def _is_data(file: Path) -> bool:
    return file.name.lower().endswith(_suffixes())


def _suffixes() -> tuple[str, ...]:
    """Of the containers of rows, and of what has a reader of its own."""
    return (*SUFFIXES, *(suffix for suffix, name in SUFFIX_TYPES.items() if name in SOURCES))


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _not_found(path: Path) -> str:
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    parent = missing.parent
    names: list[Any] = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = did_you_mean(missing.name, names)
    return line(f"{path}: not found: no '{missing.name}' in {parent}{near}", 500)
