"""Hugging Face datasets as files, for every source type whose rows stand in tables.

- A folder that `Dataset.save_to_disk` wrote is a `path` like any other, known by `state.json` and
  `dataset_info.json`; its Arrow files are read directly. Of a `DatasetDict` (`dataset_dict.json`),
  `dataset_split: train` names the part.
- `path: hf://datasets/<owner>/<name>`, or a folder in it, stands for the Parquet files of a hub
  repository (with `data.allow_network`), `dataset_split` for those of a split, `revision` for a
  branch, tag or commit. Where a repository has no Parquet files, `revision: refs/convert/parquet`
  has those that the hub makes. A path with a suffix or a glob is taken as it is.

The rows are in the layout of the source's `type`:

    sources:
      - {type: sharegpt, path: data/my_dataset, dataset_split: train}
      - {type: cord, path: hf://datasets/naver-clova-ix/cord-v2, dataset_split: train}

The `datasets` library is not used: it asks the hub even for local data.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raytune_vlm.config.sources import TableSource
from raytune_vlm.errors import DataError, did_you_mean
from raytune_vlm.sources.base import Shard, shorten
from raytune_vlm.sources.files import find_files, open_binary

HUB = "hf://datasets/"
STATE_FILE, INFO_FILE, DICT_FILE = "state.json", "dataset_info.json", "dataset_dict.json"

_SPLIT_OF_FILE = re.compile(r"(?:.*/)?([\w.]+?)(?:-\d+-of-\d+(?:-\w+)?)?\.parquet")
_NUMBER = re.compile(r"\d+")


def find_tables(
    config: TableSource, root: Path, allow_network: bool, suffixes: Sequence[str]
) -> list[Shard]:
    """The table files of a source, datasets resolved to theirs; raises DataError (`find_files`)."""
    if config.path.startswith(HUB):
        return _find_on_hub(config, root, allow_network)
    found = _by_name(find_files(config.path, root, allow_network, suffixes))
    if DICT_FILE in found and not config.path.endswith(".json"):
        splits = _read(found[DICT_FILE]).get("splits")
        names = [name for name in splits if _is_plain(name)] if isinstance(splits, list) else []
        split = _choose(config, names, f"source {config.path} ({DICT_FILE})")
        folder = f"{config.path.rstrip('/')}/{split}"
        found = _by_name(find_files(folder, root, allow_network, suffixes))
    elif config.dataset_split is not None:
        raise DataError(
            f"source {config.path} has no splits: dataset_split: {config.dataset_split} is for a "
            f"folder with {DICT_FILE} or a hub name"
        )
    if {STATE_FILE, INFO_FILE} <= found.keys() and not config.path.endswith(".json"):
        return _of_state(found)
    return list(found.values())


def _by_name(shards: Iterable[Shard]) -> dict[str, Shard]:
    """By base name, or by path where a glob found two files of one name."""
    shards = list(shards)
    found = {posixpath.basename(shard.path): shard for shard in shards}
    return found if len(found) == len(shards) else {shard.path: shard for shard in shards}


def _of_state(found: dict[str, Shard]) -> list[Shard]:
    """The Arrow files that `state.json` lists, in its order."""
    shown = found[STATE_FILE].shown
    state = _read(found[STATE_FILE])
    if state.get("_indices_data_files"):
        raise DataError(f"{shown}: rows in an order of their own (old format): save it once more")
    entries = state.get("_data_files")
    names = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in (entries if isinstance(entries, list) else [])
    ]
    if not names:
        raise DataError(f"{shown} lists no data files: not written by Dataset.save_to_disk")
    for name in names:
        if str(name) not in found or not str(name).endswith(".arrow"):
            near = did_you_mean(str(name), found)
            raise DataError(f"{shown} lists '{shorten(name)}', which is not there{near}")
    return [found[str(name)] for name in names]


def _read(shard: Shard) -> dict[str, Any]:
    try:
        with open_binary(shard.path) as stream:
            value = json.loads(stream.read())
    except Exception as error:  # not JSON, or whatever the file system raises
        raise DataError(f"{shard.shown} cannot be read: {shorten(error, 160)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{shard.shown} must hold an object, not {type(value).__name__}")
    return value


def _choose(config: TableSource, names: Sequence[str], where: str) -> str:
    """The split that is read; raises DataError where it is not there, or must be named."""
    wanted = config.dataset_split
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None:
        listed = ", ".join(sorted(names)) or "none"
        raise DataError(f"{where}: name one of its splits with dataset_split: {listed}")
    if wanted not in names:
        raise DataError(f"{where} has no split '{wanted}'{did_you_mean(wanted, names)}")
    return wanted


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) is not None


def _find_on_hub(config: TableSource, root: Path, allow_network: bool) -> list[Shard]:
    """The Parquet files of a repository, a folder of it, or a glob in it."""
    parts = config.path.removeprefix(HUB).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise DataError(f"source {config.path} must be {HUB}<owner>/<name>")
    if config.revision is not None and "@" in parts[1]:
        raise DataError(f"source {config.path} names a revision, and so does revision")
    if config.revision is not None:
        parts[1] += "@" + config.revision.replace("/", "%2F")
    url = HUB + "/".join(parts)
    if not re.search(r"\.\w+$", parts[-1] if len(parts) > 2 else ""):
        url += "/**/*.parquet"
    found = find_files(url, root, allow_network, (".parquet",))
    if config.dataset_split is None and url == HUB + "/".join(parts):
        return found
    by_split: dict[str, list[Shard]] = {}
    for shard in found:
        by_split.setdefault(split_of_file(shard.path), []).append(shard)
    split = _choose(config, list(by_split), f"source {config.path}")
    folders = {
        re.sub(rf"/(partial-)?{re.escape(split)}$", "", posixpath.dirname(shard.path))
        for shard in by_split[split]
    }
    if len(folders) > 1:
        names = ", ".join(sorted(posixpath.basename(folder) for folder in folders))
        raise DataError(
            f"source {config.path}: '{split}' stands in several folders: "
            f"put one of them into path: {shorten(names, 300)}"
        )
    return by_split[split]


def split_of_file(path: str) -> str:
    """The split of a Parquet file on the hub: `data/train-00000-of-00002.parquet`,
    `train/0000.parquet`, `partial-train/0000.parquet`.
    """
    match = _SPLIT_OF_FILE.fullmatch(path)
    name = match[1] if match else posixpath.basename(path)
    if _NUMBER.fullmatch(name):
        name = posixpath.basename(posixpath.dirname(path))
    return name.removeprefix("partial-")
