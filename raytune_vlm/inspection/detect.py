"""Which source type a file or a folder is: by its layout, its suffix, the columns of its rows.

Only types of the SOURCES table are found. Conversations are known by their turns (`{from, value}`
or `{role, content}`) whatever the column is called; other types fit a file that has all columns
that the type's config names by default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from raytune_vlm.config.sources import Source, SourceConfig
from raytune_vlm.errors import ConfigError, DataError, did_you_mean
from raytune_vlm.inspection.columns import Kind
from raytune_vlm.inspection.text import line
from raytune_vlm.sources import SOURCES

IMAGES_COLUMNS = ("images", "image", "img", "image_path", "image_paths")
"""Where the images of a conversation stand, by name, first come first."""

TURNS: Mapping[Kind, tuple[str, str]] = {
    "from/value turns": ("sharegpt", "conversations_column"),
    "role/content turns": ("messages", "messages_column"),
}
"""Kind of a column of turns -> the type that reads it, and the key that names the column."""

FOLDER_LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "sroie": ("img/", "box/"),
    "llamafactory": ("dataset_info.json",),
}
"""Type -> what a folder of it holds; a name that ends with a slash is a folder."""

LLAMAFACTORY_KEYS = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url")
"""Each entry of LLaMA-Factory's `dataset_info.json` has one of these; the file of that name that
`Dataset.save_to_disk` writes has not."""

SAVED_DATASET = ("state.json", "dataset_dict.json")
"""What a folder written by `save_to_disk` holds: of a data set, of several splits."""

SUFFIX_TYPES: Mapping[str, str] = dict.fromkeys((".tar", ".tar.gz", ".tgz"), "webdataset")
"""Suffixes that say the type."""


@dataclass(frozen=True)
class Detected:
    """A source type, what was seen of it, and the options that it needs beyond its defaults."""

    type: str
    seen: str
    """What told the type, for people: `columns conversations, images`."""
    options: dict[str, Any] = field(default_factory=dict)


OPTIONAL_KEYS = ("images_column", "answer_column", "messages_column")
"""Keys of columns that rows of a type which is known by its columns need not have."""


def source_models() -> dict[str, type[SourceConfig]]:
    """Type -> its config model, of those types that have a reader."""
    union = get_args(Source)[0]
    models = {
        get_args(model.model_fields["type"].annotation)[0]: model for model in get_args(union)
    }
    return {name: model for name, model in models.items() if name in SOURCES}


def check_type(name: str) -> str:
    """The type as given; raises ConfigError with the nearest name where there is none such."""
    known = source_models()
    if name not in known:
        near = did_you_mean(name, known)
        rest = f"; known: {', '.join(sorted(known))}" if "did you mean" in near else ""
        raise ConfigError(f"--type {name}: unknown source type{near}{rest}")
    return name


def detect_folder(folder: Path) -> Detected | None:
    """The type of a folder with a layout of its own; None where only its files can tell."""
    for name, parts in FOLDER_LAYOUTS.items():
        there = all(_is_there(folder, part) for part in parts)
        if (
            name in SOURCES
            and there
            and (name != "llamafactory" or _has_entries(folder / parts[0]))
        ):
            return Detected(name, f"a folder with {', '.join(parts)}")
    return None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder, which readers of tables take whole."""
    return any((folder / name).is_file() for name in SAVED_DATASET)


def _has_entries(file: Path) -> bool:
    """Whether a `dataset_info.json` is LLaMA-Factory's."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(entries, dict) and any(
        isinstance(entry, dict) and any(key in entry for key in LLAMAFACTORY_KEYS)
        for entry in entries.values()
    )


def _is_there(folder: Path, part: str) -> bool:
    return (folder / part).is_dir() if part.endswith("/") else (folder / part).is_file()


def detect_name(file: Path) -> Detected | None:
    """The type that a file's name alone tells; None where its columns must."""
    known = file.name in FOLDER_LAYOUTS["llamafactory"] and "llamafactory" in SOURCES
    if known and _has_entries(file):
        return Detected("llamafactory", file.name)
    for suffix, name in SUFFIX_TYPES.items():
        if file.name.lower().endswith(suffix) and name in SOURCES:
            return Detected(name, f"suffix {suffix}")
    return None


def detect_columns(columns: Mapping[str, Kind]) -> Detected:
    """The type that reads rows of these columns.

    Raises
    ------
    DataError
        If none fits, or several do: what was looked for, and what was found.
    """
    named = _by_default_names(columns)
    taken = {column for keys in named.values() for column in keys}  # TRL's prompt may hold turns
    fits = _conversations(columns, taken)
    if not fits:
        fits = [Detected(name, _columns(keys)) for name, keys in named.items()]
    if len(fits) == 1:
        return fits[0]
    if fits:
        said = " and ".join(f"{fit.type} ({fit.seen})" for fit in fits)
        raise DataError(f"fits {said}")
    raise DataError(f"has the columns {_listed(columns)}; {looked_for()}")


def looked_for() -> str:
    """What would have told a type, in one sentence."""
    turns = [f"turns of {kind.split()[0]} ({name})" for kind, (name, _) in TURNS.items()]
    named = [f"{' + '.join(keys.values())} ({name})" for name, keys in _default_columns().items()]
    folders = [
        f"a folder with {' and '.join(parts)} ({name})"
        for name, parts in FOLDER_LAYOUTS.items()
        if name in SOURCES
    ]
    return f"looked for {', '.join([*turns, *named, *folders])}"


def _conversations(columns: Mapping[str, Kind], taken: set[str]) -> list[Detected]:
    images = next((name for name in IMAGES_COLUMNS if name in columns), None)
    fits = []
    for name, kind in columns.items():
        if name in taken or kind == "other" or TURNS[kind][0] not in SOURCES:
            continue
        source, key = TURNS[kind]
        given = {key: name, "images_column": images}
        fields = source_models()[source].model_fields
        options = {
            option: value
            for option, value in given.items()
            if value is not None and value != fields[option].default
        }
        seen = [value for value in given.values() if value is not None]
        fits.append(Detected(source, _columns(seen), options))
    return fits


def _by_default_names(columns: Mapping[str, Kind]) -> dict[str, list[str]]:
    """Type -> its columns, of those types whose columns are all there."""
    fits = {}
    for name, keys in _default_columns().items():
        if all(column in columns for column in keys.values()):
            known = source_models()[name].model_fields
            optional = [known[key].default for key in OPTIONAL_KEYS if key in known]
            fits[name] = [*keys.values(), *(column for column in optional if column in columns)]
    return fits


def _default_columns() -> dict[str, dict[str, str]]:
    """Type -> key -> the column that it names by default, of types known by their columns.

    The columns of OPTIONAL_KEYS are left out.
    """
    by_turns = {name for name, _ in TURNS.values()}
    found: dict[str, dict[str, str]] = {}
    for name, model in source_models().items():
        if name in by_turns or name in FOLDER_LAYOUTS or name in SUFFIX_TYPES.values():
            continue
        keys = {
            key: info.default
            for key, info in model.model_fields.items()
            if key.endswith("_column")
            and key not in OPTIONAL_KEYS
            and isinstance(info.default, str)
        }
        if keys:
            found[name] = keys
    return found


def _columns(names: Sequence[str]) -> str:
    return f"column{'s' * (len(names) > 1)} {_listed(names)}"


def _listed(names: Any) -> str:
    shown = [line(name, 40) for name in names]
    return ", ".join(shown[:24]) + (f" and {len(shown) - 24} more" if len(shown) > 24 else "")
