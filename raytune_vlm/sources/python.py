"""`python`: a format of your own, read by a function of your own.

    # my_package/my_data.py
    def rows(options: dict, path: str) -> Iterator[dict]:
        for line in open(path):
            yield {
                "messages": [
                    {"role": "user", "content": "<image>What is this?"},
                    {"role": "assistant", "content": line.strip()},
                ],
                "images": ["pictures/1.png"],
                "group_id": "document 7",
            }

    # experiment.yaml
    sources:
      - {type: python, path: data/mine.txt, function: "my_package.my_data:rows", options: {a: 1}}

The contract: the function is called once a shard with the source's `options` and the absolute path
of a file or folder (or the URL), and yields one dict a row, always the same ones in the same order.
A dict is in the layout of `messages`: `messages`, `images` (paths, bytes) and `group_id`, the last
two optional. `path` is a file or a folder, which is one shard, or a glob, each match of which is
one. Paths of images are relative to the folder of the file, to the folder, or to `data.root`.

A row that is refused costs itself; an exception ends its shard with one quarantined entry. The
module must be importable on every worker: installed, or on PYTHONPATH. The data is prepared anew
when the function's module or a file under `path` changes, not when another module does.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import inspect
import itertools
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import MessagesSource, PythonSource
from raytune_vlm.errors import DataError, did_you_mean
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources.base import Reader, Shard, attempt, number_shards, shorten
from raytune_vlm.sources.containers.raw import RawRow, as_row
from raytune_vlm.sources.files import find_files, find_path, resolve_root, show
from raytune_vlm.sources.messages import convert
from raytune_vlm.sources.remote import is_remote
from raytune_vlm.sources.rows import Row

Function = Callable[[dict[str, Any], str], Iterator[dict[str, Any]]]

_MESSAGES = MessagesSource(type="messages", path="")


def list_shards(config: PythonSource, root: Path, allow_network: bool) -> list[Shard]:
    """One shard for the path, or one for each file that a glob matches.

    Raises DataError where the path is wrong (`find_files`), or there is no such function.
    """
    if is_remote(config.path) or glob.has_magic(config.path):
        shards = find_files(config.path, root, allow_network, ())
    else:
        path, top = find_path(config.path, root), resolve_root(root)
        near = path if path.is_dir() else path.parent
        folders = tuple(dict.fromkeys((str(near.resolve()), str(near), str(top))))
        shards = [Shard(str(path), 0, show(path, top), folders)]
    source = module_of(import_function(config.function))
    shards = [replace(shard, digest=_digest(source, shard)) for shard in shards]
    if len(shards) == 1:  # no need to count
        return [replace(shards[0], limit=config.max_samples)]
    return number_shards(shards, config.max_samples, partial(_count, config))


def read_shard(
    config: PythonSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The rows that the function yields for a shard."""
    for raw in itertools.islice(_rows(config, shard), shard.limit):
        row = Row(raw, shard, limits)
        if raw.reason:
            yield Quarantined(row.origin, raw.reason, config.split)
        else:
            yield attempt(row.origin, config.split, partial(convert, _MESSAGES, row))


def import_function(name: str) -> Function:
    """The function `package.module:name`; raises DataError with the nearest name."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if not f"{module_name}.".startswith(f"{missing}."):  # the module's own imports
            raise DataError(f"source function {name}: {error}") from error
        near = did_you_mean(missing.rpartition(".")[2], _modules_beside(missing))
        raise DataError(
            f"source function {name}: no module '{missing}'{near}; "
            "it must be installed or on PYTHONPATH"
        ) from error
    except Exception as error:  # importing runs whatever the module holds
        detail = f"{type(error).__name__}: {shorten(error, 160)}"
        raise DataError(f"source function {name}: importing it raises {detail}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        named = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        what = f"no '{attribute}'" if function is None else f"'{attribute}' is no function"
        near = did_you_mean(attribute, named)
        raise DataError(f"source function {name}: {what} in {module_name}{near}")
    return function  # type: ignore[no-any-return]


def _modules_beside(missing: str) -> list[str]:
    parent = missing.rpartition(".")[0]
    path = getattr(importlib.import_module(parent), "__path__", []) if parent else None
    return [module.name for module in pkgutil.iter_modules(path)]


def _rows(config: PythonSource, shard: Shard) -> Iterator[RawRow]:
    """The function's rows, numbered from 1; an exception is the last one. Raises DataError only."""
    function = import_function(config.function)
    number = 0
    try:
        for number, value in enumerate(function(dict(config.options), shard.path), 1):
            yield as_row(number, value)
    except Exception as error:
        detail = f"{type(error).__name__}: {shorten(error, 160)}"
        yield RawRow(number + 1, reason=f"{config.function} raises {detail}")


def _count(config: PythonSource, shard: Shard, at_most: int) -> int:
    return sum(1 for _ in itertools.islice(_rows(config, shard), at_most))


def module_of(function: Function) -> bytes:
    """The source of the module that a function stands in; empty where it has none."""
    try:
        return Path(inspect.getfile(inspect.unwrap(function))).read_bytes()
    except (OSError, TypeError):  # compiled, or an object that is called
        return b""


def _digest(source: bytes, shard: Shard) -> str:
    """The module's content and the state of the files under the shard's path."""
    digest = hashlib.blake2b(source, digest_size=16)
    digest.update(shard.digest.encode())
    if is_remote(shard.path):
        return digest.hexdigest()
    files = [(str(Path(at) / name)) for at, _, names in os.walk(shard.path) for name in names]
    for file in sorted(files) or [shard.path]:
        try:
            state = Path(file).stat()
        except OSError:  # a dangling link
            continue
        digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


READER = Reader(list_shards, read_shard)
