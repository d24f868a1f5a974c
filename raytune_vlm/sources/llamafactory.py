"""`llamafactory`: data that a `dataset_info.json` of LLaMA-Factory describes.

`path` is that file, or its folder; `dataset` is the name of an entry. What an entry may say is what
LLaMA-Factory's `data/README.md` documents; where it says `columns`, those that it does not name are
not read, except that `messages`, `prompt` and `response` keep their default names.

- `file_name`: a file or folder beside `dataset_info.json`, which images are relative to as well.
- `formatting: sharegpt` (`messages`, `tags`) or `alpaca`, the default (`history`, then `prompt` and
  `query` joined by a line break, then `response`).
- `system`, `images`. Rows with `tools`, `videos` or `audios` are quarantined, tool turns too.

Anything else is refused by name: preference data, data on a hub, sampling.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import LlamaFactorySource
from raytune_vlm.errors import DataError, did_you_mean
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import (
    Reader,
    RowError,
    Shard,
    check_counts,
    shorten,
    text_parts,
)
from raytune_vlm.sources.files import (
    find_files,
    find_folder,
    open_binary,
    resolve_root,
    show,
)
from raytune_vlm.sources.remote import is_remote
from raytune_vlm.sources.rows import SUFFIXES, Row, cut_tables, read_table

INFO_FILE = "dataset_info.json"
FORMATTINGS = ("alpaca", "sharegpt")
UNSUPPORTED = {
    "hf_hub_url": "name it in path: hf://datasets/<name>, with type: sharegpt or another",
    "ms_hub_url": "download it, and name the file in file_name",
    "om_hub_url": "download it, and name the file in file_name",
    "script_url": "scripts are not run: write the data as a file, and name it in file_name",
    "cloud_file_name": "name the URL in path, with type: sharegpt or another",
    "ranking": "preference data is not for supervised training",
    "num_samples": "it draws at random: use max_samples",
    "subset": "it belongs to data on a hub",
    "folder": "it belongs to data on a hub",
    "revision": "it belongs to data on a hub",
}
"""Keys of an entry that have no effect here, and what to do instead."""
PREFERENCE_COLUMNS = ("chosen", "rejected", "kto_tag")
REFUSED_COLUMNS = ("tools", "videos", "audios")


@dataclass(frozen=True)
class Columns:
    """Names of columns; empty: not read."""

    messages: str = "conversations"
    prompt: str = "instruction"
    query: str = ""
    response: str = "output"
    history: str = ""
    system: str = ""
    images: str = ""
    tools: str = ""
    videos: str = ""
    audios: str = ""

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in asdict(self).values() if name)


@dataclass(frozen=True)
class Tags:
    """The words of a sharegpt turn."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"

    def roles(self) -> dict[str, str]:
        return {
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.system_tag: "system",
        }


@dataclass(frozen=True)
class Entry:
    """An entry of `dataset_info.json`, checked."""

    file_name: str
    formatting: str = "alpaca"
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)

    @classmethod
    def from_json(cls, text: str) -> Entry:
        value = json.loads(text)
        return cls(
            **{**value, "columns": Columns(**value["columns"]), "tags": Tags(**value["tags"])}
        )


def list_shards(config: LlamaFactorySource, root: Path, allow_network: bool) -> list[Shard]:
    """The entry's files, cut as tables are; raises DataError for an entry that cannot be used."""
    info = _find_info(config.path, root, allow_network)
    entry = _entry_of(config, info)
    folder, name = posixpath.dirname(info.path), posixpath.normpath(entry.file_name)
    if name.startswith(("/", "..")) or is_remote(entry.file_name):
        raise DataError(
            f"{info.shown}: file_name '{shorten(entry.file_name)}' leaves the folder of the file"
        )
    details = json.dumps(asdict(entry), sort_keys=True)
    if is_remote(folder):
        files = find_files(f"{folder}/{name}", root, allow_network, SUFFIXES)
        files = [replace(file, folders=(folder,), details=details) for file in files]
    else:
        top = resolve_root(root)
        files = [
            replace(
                file,
                shown=show(Path(file.path), top),
                folders=tuple(dict.fromkeys((folder, *file.folders, str(top)))),
                details=details,
            )
            for file in find_files(name, Path(folder), allow_network, SUFFIXES)
            if posixpath.basename(file.path) != posixpath.basename(info.path)
        ]
    return cut_tables(files, config.max_samples)


def _find_info(path: str, root: Path, allow_network: bool) -> Shard:
    if not path.lower().endswith(".json"):
        if not is_remote(path):
            find_folder(path, root)
        path = f"{path.rstrip('/')}/{INFO_FILE}"
    found = find_files(path, root, allow_network, (".json",))
    if len(found) > 1:
        raise DataError(f"source {path} matches {len(found)} files: it must be one {INFO_FILE}")
    return found[0]


def _entry_of(config: LlamaFactorySource, info: Shard) -> Entry:
    try:
        with open_binary(info.path) as stream:
            entries = json.loads(stream.read().removeprefix(b"\xef\xbb\xbf"))
    except Exception as error:  # not JSON, or whatever the file system raises
        raise DataError(f"{info.shown} cannot be read: {shorten(error, 160)}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{info.shown} must hold an object, not {type(entries).__name__}")
    name = config.dataset
    if name is None and len(entries) != 1:
        listed = shorten(", ".join(sorted(entries)), 300)
        raise DataError(f"{info.shown} has {len(entries)} entries: name one in dataset: {listed}")
    name = next(iter(entries)) if name is None else name
    if name not in entries:
        raise DataError(f"{info.shown} has no entry '{name}'{did_you_mean(name, entries)}")
    try:
        return parse_entry(entries[name])
    except RowError as error:
        raise DataError(f"{info.shown}: entry '{name}': {error.message}") from error


def parse_entry(value: Any) -> Entry:
    """The entry, checked; raises RowError where it says something that would not be honoured."""
    if not isinstance(value, dict):
        raise RowError(f"it must be an object, not {type(value).__name__}")
    known = ("file_name", "formatting", "columns", "tags", "split")
    for key, content in value.items():
        if key in UNSUPPORTED and content not in (None, False, ""):
            raise RowError(f"{key} is not supported: {UNSUPPORTED[key]}")
        if key not in known and key not in UNSUPPORTED:
            raise RowError(f"unknown key '{shorten(key, 40)}'{did_you_mean(key, known)}")
    if value.get("split", "train") != "train":
        raise RowError(f"split '{shorten(value['split'], 40)}': a file has only train")
    file_name, formatting = value.get("file_name"), value.get("formatting", "alpaca")
    if not isinstance(file_name, str) or not file_name:
        raise RowError("it has no file_name")
    if formatting not in FORMATTINGS:
        near = did_you_mean(str(formatting), FORMATTINGS)
        raise RowError(f"unknown formatting '{shorten(formatting, 40)}'{near}")
    if formatting == "alpaca" and "tags" in value:
        raise RowError("tags belong to formatting: sharegpt, this entry is alpaca")
    columns = _names(value, "columns", Columns)
    if "columns" not in value:
        columns["query"] = "input"
    return Entry(file_name, formatting, Columns(**columns), Tags(**_names(value, "tags", Tags)))


def _names(
    value: Mapping[str, Any], part: str, model: type[Columns] | type[Tags]
) -> dict[str, str]:
    """The names that `columns` or `tags` give; raises RowError for one that is not known."""
    given = value.get(part, {})
    if not isinstance(given, dict):
        raise RowError(f"{part} must be an object, not {type(given).__name__}")
    known = [entry.name for entry in fields(model)]
    for key, name in given.items():
        if part == "columns" and key in PREFERENCE_COLUMNS:
            raise RowError(f"columns.{key}: {UNSUPPORTED['ranking']}")
        if key not in known:
            raise RowError(f"unknown key {part}.{shorten(key, 40)}{did_you_mean(key, known)}")
        if name is not None and not isinstance(name, str):
            raise RowError(f"{part}.{key} must be a name, not {type(name).__name__}")
    return {key: name for key, name in given.items() if name}


def read_shard(
    config: LlamaFactorySource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The rows of a shard, as its entry describes them."""
    entry = Entry.from_json(shard.details)
    return read_table(config, shard, limits, entry.columns.names(), partial(_convert, entry))


def _convert(entry: Entry, row: Row) -> Sample:
    columns = entry.columns
    for kind in REFUSED_COLUMNS:
        name = getattr(columns, kind)
        if name and row.raw.values.get(name):
            raise RowError(f"the row has {kind} (column '{name}'), which are not supported")
    messages = _talk(entry, row) if entry.formatting == "sharegpt" else _alpaca(columns, row)
    system = row.raw.values.get(columns.system) if columns.system else None
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, _turn("system", system, columns.system))
    count = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if not columns.images:
        check_counts(count, 0, " (the entry names no column of images)")
        return row.sample(messages, [])
    row.check_images(count, columns.images)
    return row.sample(messages, row.images(columns.images))


def _talk(entry: Entry, row: Row) -> list[dict[str, Any]]:
    tags, roles = entry.tags, entry.tags.roles()
    messages = []
    for number, turn in enumerate(row.turns(entry.columns.messages), 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} must be an object, not {type(turn).__name__}")
        speaker = turn.get(tags.role_tag)
        if not isinstance(speaker, str):
            raise RowError(f"turn {number} has no '{tags.role_tag}'")
        if speaker in (tags.observation_tag, tags.function_tag):
            raise RowError(f"turn {number} is a tool turn ('{speaker}'), which is not supported")
        if speaker not in roles:
            name = shorten(speaker, 24)
            raise RowError(f"turn {number} is from '{name}'{did_you_mean(name, roles)}")
        content = turn.get(tags.content_tag)
        messages.append(_turn(roles[speaker], content, f"{tags.content_tag} of turn {number}"))
    return messages


def _alpaca(columns: Columns, row: Row) -> list[dict[str, Any]]:
    messages = []
    history = row.raw.values.get(columns.history) if columns.history else None
    for number, pair in enumerate(history or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"{columns.history} {number} must be a prompt and a response")
        messages.append(_turn("user", pair[0], f"{columns.history} {number}"))
        messages.append(_turn("assistant", pair[1], f"{columns.history} {number}"))
    asked = [row.text(columns.prompt)]
    if columns.query and row.raw.values.get(columns.query):
        asked.append(row.text(columns.query))
    messages.append(_turn("user", "\n".join(text for text in asked if text), columns.prompt))
    messages.append(_turn("assistant", row.text(columns.response), columns.response))
    return messages


def _turn(role: str, text: Any, where: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise RowError(f"{where} must be a string, not {type(text).__name__}")
    return {"role": role, "content": text_parts(text)}


READER = Reader(list_shards, read_shard)
