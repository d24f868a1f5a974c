"""`--trust-remote-code MODEL@REVISION`: the one way in which code that comes with a model may run.

Some families have no class in transformers, only Python files beside their weights
(`models/remote_families.py`). Those run if, and only if, somebody names model and revision on the
command line, having read them:

- of a model on the hub, REVISION is the full commit hash, and that commit is what is loaded;
- of a local folder, REVISION is `code_digest`: a digest of its Python files and of what its JSON
  files say about which classes to take, so that changed code asks again.

The opt-in is a private attribute of `ModelConfig`, no key: what is read from a file can neither
hold it nor turn it on. `experiment.json` records what was trusted, and `resume` and `evaluate`
still want the option: a sweep folder is data. Every process that loads a model (`check_model`)
compares anew, so code that changed while a sweep ran is refused too.

A model whose family transformers knows is loaded by transformers' class, whatever its `auto_map`
says. Trusted code can do anything that its user can, loading yet other code included.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ConfigError, ModelError

OPTION = "--trust-remote-code"

_HASH = re.compile(r"[0-9a-f]{40}")


def with_trust(experiment: ExperimentConfig, option: str | None) -> ExperimentConfig:
    """The experiment with the code trusted that an option MODEL@REVISION names; None trusts none.

    Raises
    ------
    ConfigError
        If the option is malformed, names another model, or another revision than the experiment
        or the folder has.
    """
    if option is None:
        return experiment
    name, at, revision = option.rpartition("@")
    config = experiment.model
    if not at or not name:
        raise ConfigError(f"{OPTION} {option}: must be MODEL@REVISION")
    if not _same_model(name, config.name):
        raise ConfigError(f"{OPTION} {option}: the model is model.name={config.name!r}")
    if not _HASH.fullmatch(revision):
        raise ConfigError(
            f"{OPTION} {option}: REVISION must be 40 hexadecimal digits: the full commit hash of a "
            "model on the hub, or the digest of a local folder's code, which the command tells "
            "without this option"
        )
    folder = Path(config.name)
    if folder.is_dir():
        found = code_digest(folder)
        if found != revision:
            raise ConfigError(
                f"{OPTION} {option}: the code of {folder} is another one, {found}; read it, then "
                f"give {_option(config.name, found)}"
            )
    elif config.revision not in (None, revision):
        raise ConfigError(
            f"{OPTION} {option}: the experiment has model.revision={config.revision!r}; "
            "give the same commit in both, or leave model.revision out"
        )
    else:
        config = config.model_copy(update={"revision": revision})
    return experiment.model_copy(update={"model": config.trusting(revision)})


def check_trust(config: ModelConfig, model_type: str, config_file: Path) -> None:
    """Raise ModelError unless the code that a model needs is trusted as it is now.

    Parameters
    ----------
    config_file
        Its `config.json`, in its folder or in the hub's cache.
    """
    folder = Path(config.name)
    if folder.is_dir():
        revision: str | None = code_digest(folder)
        where = f"{folder}/*.py"
        maps = list(_auto_maps(folder))
    else:
        commit = config_file.parent.name  # the hub's cache is <model>/snapshots/<commit>/
        revision = commit if _HASH.fullmatch(commit) else None
        where = f"the Python files of {config.name}"
        maps = list(_find(json.loads(config_file.read_text(encoding="utf-8"))))
    if not maps:
        raise ModelError(
            f"model.name={config.name!r}: {model_type} has no class in transformers, and the model "
            "brings no code of its own (auto_map)"
        )
    foreign = [text for found in maps for text in _texts(found) if "--" in text]
    if foreign:
        raise ModelError(
            f"model.name={config.name!r}: its auto_map takes code from another repository "
            f"({foreign[0]}), which no revision pins; copy that code into a local folder"
        )
    if revision is None or config.trusted_revision != revision:
        raise ModelError(
            f"model.name={config.name!r}: {model_type} has no class in transformers, only code "
            f"that comes with the model and does not run unasked; read {where}, then give "
            f"{_option(config.name, revision or 'COMMIT')}"
        )


def code_digest(folder: Path) -> str:
    """SHA-256 (first 40 hex digits) of a folder's Python files and the `auto_map`s of its JSON.

    Forty digits, not sixteen: whoever makes the folder could otherwise find two codes, a harmless
    and a harmful one, of the same digest.

    Raises
    ------
    ModelError
        If a subfolder is a link: what it shows may change unseen.
    """
    digest = hashlib.sha256()
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        if linked:
            raise ModelError(f"{folder}: {Path(parent) / linked[0]} is a link to a folder")
        files += [Path(parent) / name for name in names if name.endswith(".py")]
    for file in sorted(files):
        content = file.read_bytes()
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    digest.update(json.dumps(list(_auto_maps(folder)), sort_keys=True).encode())
    return digest.hexdigest()[:40]


def _auto_maps(folder: Path) -> Iterator[Any]:
    for file in sorted(folder.glob("*config.json")):
        try:
            yield from _find(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ModelError(f"{file} is not JSON: {error}") from None


def _find(plain: Any) -> Iterator[Any]:
    """Every `auto_map` in JSON data, however deep."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            if key == "auto_map":
                yield value
            else:
                yield from _find(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _find(value)


def _texts(plain: Any) -> Iterator[str]:
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, dict | list):
        for value in plain.values() if isinstance(plain, dict) else plain:
            yield from _texts(value)


def _same_model(given: str, name: str) -> bool:
    """The same text, or the same folder: sweep folders hold the absolute path."""
    if given == name:
        return True
    return Path(given).is_dir() and Path(given).resolve() == Path(name).resolve()


def _option(name: str, revision: str) -> str:
    return f"{OPTION} {shlex.quote(f'{name}@{revision}')}"
