"""Paths of sources and images: what may be read, where it lies, and how it is opened.

The rule for a source's path: relative to `data.root`, and then it must stay inside (neither `..`
nor a symbolic link leads out); or absolute, and then it may lie anywhere, because a person wrote
it into the experiment. Files found in a folder or by a glob must lie inside the root, or inside
the folder that the absolute path names.

The rule for images that rows name: inside the folder of their source file or inside `data.root`.
Rows come from others, so an absolute path or a link that leaves both is refused.
"""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from raytune_vlm.errors import DataError, did_you_mean
from raytune_vlm.sources.base import RowError, Shard, shorten
from raytune_vlm.sources.remote import find_remote, is_remote, open_remote

_NOTED: ContextVar[dict[str, tuple[int, ...]] | None] = ContextVar("noted", default=None)


@contextmanager
def noted_images() -> Iterator[dict[str, tuple[int, ...]]]:
    """While the block runs, which local image files were read: path -> (size, mtime_ns).

    For whoever iterates over `read_shard` and wants to know later whether a picture has changed.
    Files that were looked for and not found are noted too, as `()`: they may come. Only what is
    read in the thread (the context) of the block is noted.
    """
    noted: dict[str, tuple[int, ...]] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def find_files(path: str, root: Path, allow_network: bool, suffixes: Sequence[str]) -> list[Shard]:
    """The files of a source, sorted, as a shard each; `suffixes` may be empty: any.

    Raises DataError where the path does not exist, matches nothing, leaves its folder, has none of
    the suffixes, or is a URL without `allow_network`.
    """
    if is_remote(path):
        return [
            Shard(url, 0, url, (posixpath.dirname(url),), digest=state)
            for url, state in find_remote(path, allow_network, suffixes)
        ]
    top = resolve_root(root)
    base = Path(path).expanduser()
    target = base if base.is_absolute() else top / base
    if target.exists():
        _check_inside(target, target, top, absolute=base.is_absolute())
        found = _in_folder(target, suffixes) if target.is_dir() else [target]
        if not target.is_dir() and not target.is_file():
            raise DataError(f"source {target} is neither a file nor a folder")
        if target.is_file() and not _has_suffix(target.name, suffixes):
            raise DataError(
                f"source file {target} has no supported suffix (known: {', '.join(suffixes)})"
            )
        if not found:
            raise DataError(
                f"source folder {target} holds no file with a supported suffix "
                f"({', '.join(suffixes)}); a glob such as 'data/**/*.parquet' reads subfolders"
            )
        anchor = target if target.is_dir() else target.parent
    elif glob.has_magic(path):
        anchor, found = _match(target, suffixes)
    else:
        raise DataError(_not_found(target, top))
    shards = []
    for file in found:
        if file != target:
            _check_inside(file, anchor if base.is_absolute() else file, top, base.is_absolute())
        folders = tuple(dict.fromkeys((str(file.resolve().parent), str(file.parent), str(top))))
        shards.append(Shard(str(file), 0, show(file, top), folders))
    return shards


def find_folder(path: str, root: Path) -> Path:
    """The folder of a source that is one; raises DataError as `find_files` does."""
    target = find_path(path, root)
    if not target.is_dir():
        raise DataError(f"source {target} is not a folder")
    return target


def find_path(path: str, root: Path) -> Path:
    """A file or folder that is taken whole; raises DataError as `find_files` does."""
    if is_remote(path):
        raise DataError(f"source {path}: this type reads local files only")
    top = resolve_root(root)
    base = Path(path).expanduser()
    target = base if base.is_absolute() else top / base
    if not target.exists():
        raise DataError(_not_found(target, top))
    _check_inside(target, target, top, absolute=base.is_absolute())
    return target


def resolve_root(root: Path) -> Path:
    """`data.root` as an absolute path without links; raises DataError where it is no folder."""
    top = root.expanduser().resolve()
    if not top.is_dir():
        raise DataError(_not_found(top, top) if not top.exists() else f"{top} is not a folder")
    return top


def show(file: Path, top: Path) -> str:
    """The path relative to the root where it lies inside, else in full."""
    return file.relative_to(top).as_posix() if file.is_relative_to(top) else file.as_posix()


def open_binary(path: str) -> IO[bytes]:
    """Open a local file or a URL for reading; raises OSError."""
    return open_remote(path) if is_remote(path) else Path(path).open("rb")


def read_image(name: str, shard: Shard, max_bytes: int, what: str = "image") -> bytes:
    """The bytes of an image, or of `what` it is, that a row names.

    Raises RowError where it is missing, no file, too large, a URL, or outside the shard's folders.
    """
    if is_remote(name):
        raise RowError(f"{what} is a URL, which rows may not name: {shorten(name)}")
    if is_remote(shard.path):
        return _read_remote_image(name, shard, max_bytes, what)
    outside = False
    missing: dict[str, tuple[int, ...]] = {}
    for folder in shard.folders:
        try:
            file = (Path(folder) / name).resolve()
            if not any(file.is_relative_to(allowed) for allowed in shard.folders):
                outside = True
                continue
            if file.is_file():
                return _read_at_most(str(file), max_bytes, what)
            missing[str(file)] = ()
        except (OSError, ValueError, RuntimeError) as error:  # name too long, NUL, loop of links
            raise RowError(f"{what} cannot be read: {shorten(name)} ({error})") from error
    noted = _NOTED.get()
    if noted is not None:
        noted.update(missing)
    if outside:
        raise RowError(f"{what} is outside the source's folder and data.root: {shorten(name)}")
    raise RowError(f"{what} not found: {shorten(name)}")


def _read_remote_image(name: str, shard: Shard, max_bytes: int, what: str) -> bytes:
    folder = shard.folders[0]
    relative = posixpath.normpath(name)
    if relative.startswith(("/", "..")):
        raise RowError(f"{what} is outside the source's folder: {shorten(name)}")
    try:
        return _read_at_most(f"{folder}/{relative}", max_bytes, what)
    except FileNotFoundError as error:
        raise RowError(f"{what} not found: {shorten(name)}") from error


def _read_at_most(path: str, max_bytes: int, what: str) -> bytes:
    with open_binary(path) as stream:
        data = stream.read(max_bytes + 1)
        noted = _NOTED.get()
        if noted is not None and not is_remote(path):
            state = os.fstat(stream.fileno())
            noted[path] = (state.st_size, state.st_mtime_ns)
    if len(data) > max_bytes:
        raise RowError(f"the {what} has more than {max_bytes} bytes: {shorten(path)}")
    return data


def _has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    return not suffixes or name.lower().endswith(tuple(suffixes))


def _in_folder(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The folder's own files with a suffix, sorted; hidden ones (`.x`, `_x`) are left out."""
    names = (file for file in folder.iterdir() if not file.name.startswith((".", "_")))
    return sorted(file for file in names if _has_suffix(file.name, suffixes) and file.is_file())


def _match(pattern: Path, suffixes: Sequence[str]) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and the files that a glob matches, sorted."""
    parts = pattern.parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    anchor = Path(*parts[:fixed])
    matches = [Path(name) for name in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207
    found = sorted(file for file in matches if file.is_file() and _has_suffix(file.name, suffixes))
    if not found:
        what = "no file with a supported suffix" if matches else "nothing"
        where = "" if anchor.is_dir() else f" (there is no folder {anchor})"
        raise DataError(f"source glob {pattern} matches {what}{where}")
    return anchor, found


def _check_inside(file: Path, anchor: Path, top: Path, absolute: bool) -> None:
    """Raise DataError where a path leaves what it may read (see the top of this file)."""
    real = file.resolve()
    allowed = [top, anchor.resolve()] if absolute else [top]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise DataError(
            f"source {file} leaves {allowed[-1]} (it is {real}); "
            "give data.root a folder above it, or name it by its absolute path"
        )


def _not_found(target: Path, top: Path) -> str:
    """The message for a path that does not exist: its resolved form and the nearest name."""
    missing = target
    while not missing.parent.exists():
        missing = missing.parent
    parent = missing.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return (
        f"source path not found: {target}: no '{missing.name}' in {parent}"
        f"{did_you_mean(missing.name, names)}; relative paths start from data.root, {top}"
    )
