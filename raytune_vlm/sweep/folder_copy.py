"""A sweep folder, copied to an object store as it grows, and brought back on another machine.

Executors and driver work on a file system, where a rename is atomic and a line can be appended; a
store has neither. So the folder stays where it is, and a thread of the driver copies what changed.
The ledger is read first and written last: whatever a copied ledger speaks of was copied before it.
A sweep that is brought back goes on from there as after any other kill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import ConfigError, InfrastructureError
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import SweepFolder
from raytune_vlm.sources.base import shorten
from raytune_vlm.sources.remote import arrow_system

EVERY_S = 5.0
"""Pause between two copies."""

_LAST = ("manifest.json", "scores.json", "result.json")
"""Files that say that those beside them are whole."""

_LOCAL = (
    "lease.json",
    *("study.db", "study.db-journal", "study-images"),
    *("mlflow.db", "mlflow.db-journal", "tensorboard", "wandb"),
)
"""What means nothing elsewhere, or is made again; files and folders."""


class FolderCopy:
    """Keeps a copy of a folder under a URL."""

    def __init__(self, folder: SweepFolder, url: str) -> None:
        self._folder, self.url = folder, url.rstrip("/")
        self._system, self._root = arrow_system(self.url)
        self._there: dict[str, tuple[int, int]] = {}
        """File -> size and time of change when it was copied."""

    def sync(self) -> None:
        """Copy what changed, the ledger last; then delete what is gone."""
        ledger = self._folder.ledger_file
        before = ledger.read_bytes() if ledger.exists() else b""
        found = self._files()
        for name in sorted(found, key=lambda name: (name.endswith(_LAST), name)):
            if self._there.get(name) != found[name]:
                try:
                    content = (self._folder.root / name).read_bytes()
                except FileNotFoundError:
                    continue  # a checkpoint that went in the meantime
                self._write(name, content)
                self._there[name] = found[name]
        self._write(ledger.name, before[: before.rfind(b"\n") + 1])
        for name in self._there.keys() - found.keys():
            self._system.delete_file(f"{self._root}/{name}")
            del self._there[name]

    def _files(self) -> dict[str, tuple[int, int]]:
        root, found = self._folder.root, {}
        for file in root.rglob("*"):
            relative = file.relative_to(root)
            # A link is not followed: it may show a file that has nothing to do with the sweep.
            passing = file.is_symlink() or any(part.startswith(".") for part in relative.parts)
            own = relative.parts[0] in (*_LOCAL, self._folder.ledger_file.name)
            try:
                if file.is_file() and not passing and not own:
                    state = file.stat()
                    found[relative.as_posix()] = (state.st_size, state.st_mtime_ns)
            except FileNotFoundError:
                continue
        return found

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self._root}/{name}"
        self._system.create_dir(path.rpartition("/")[0], recursive=True)
        with self._system.open_output_stream(path) as stream:
            stream.write(content)

    def holds_a_sweep(self) -> bool:
        """Whether there is a sweep under the URL."""
        from pyarrow.fs import FileType

        info = self._system.get_file_info(f"{self._root}/{self._folder.experiment_file.name}")
        return bool(info.type == FileType.File)


@contextmanager
def copied(
    folder: SweepFolder, experiment: ExperimentConfig, monitor: Monitor, *, new: bool
) -> Iterator[None]:
    """Copy the folder to `storage_copy` now, every few seconds and at the end, if there is one.

    Raises
    ------
    ConfigError
        If the store cannot be written, or a new sweep would overwrite another.
    InfrastructureError
        At the end, if the last copy failed: what is in the store is behind.
    """
    if experiment.storage_copy is None:
        yield
        return
    copy = FolderCopy(folder, f"{experiment.storage_copy.rstrip('/')}/{experiment.name}")
    if new and _tried(copy.holds_a_sweep, copy.url, ConfigError):
        raise ConfigError(
            f"storage_copy: {copy.url} holds a sweep already: `raytune-vlm resume {copy.url} "
            "--into DIR` continues it, another name= starts a new one"
        )
    _tried(copy.sync, copy.url, ConfigError)
    monitor.say(f"copy: {folder.root} is copied to {copy.url}")
    over = threading.Event()
    thread = threading.Thread(
        target=_keep_copying, args=(copy, over, monitor), name="folder-copy", daemon=True
    )
    thread.start()
    try:
        yield
    except BaseException:
        _end(over, thread)
        _copy_once(copy, monitor)  # what went wrong is being told already
        raise
    _end(over, thread)
    _tried(copy.sync, copy.url, InfrastructureError)


def _end(over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    thread.join()


def _keep_copying(copy: FolderCopy, over: threading.Event, monitor: Monitor) -> None:
    works = True
    while not over.wait(EVERY_S):
        before, works = works, _copy_once(copy, monitor if works else None)
        if works and not before:
            monitor.say(f"copy: {copy.url} is up to date again")


def _copy_once(copy: FolderCopy, monitor: Monitor | None) -> bool:
    """Whether it worked; if not, a person is told."""
    try:
        copy.sync()
    except Exception as error:  # of whatever kind the file system has; the next round tries again
        if monitor is not None:
            monitor.say(f"copy: WARNING: {copy.url} is behind: {shorten(error, 240)}")
        return False
    return True


def _tried(action: Callable[[], Any], url: str, kind: type[Exception]) -> Any:
    try:
        return action()
    except Exception as error:
        detail = f"{type(error).__name__}: {shorten(error, 240)}"
        raise kind(f"storage_copy: {url} cannot be reached: {detail}") from error


def bring_back(url: str, into: Path) -> Path:
    """Copy a sweep folder from a store into a folder; its place there.

    Raises
    ------
    ConfigError
        If there is no sweep under the URL, its place is taken, or a name there leads out of it.
    """
    from pyarrow.fs import FileSelector, FileType

    folder = SweepFolder((into / url.rstrip("/").rpartition("/")[2]).resolve())
    if folder.root.exists():
        raise ConfigError(f"{folder.root} is there already: `raytune-vlm resume {folder.root}`")
    copy = FolderCopy(folder, url)
    if not _tried(copy.holds_a_sweep, copy.url, ConfigError):
        raise ConfigError(f"{url} is not a sweep folder: it has no experiment.json")
    system, root = arrow_system(copy.url)
    entries = system.get_file_info(FileSelector(root, recursive=True))
    for entry in entries:
        if entry.type == FileType.File:
            name = entry.path.removeprefix(f"{root}/")
            file = folder.root / name
            if not file.resolve().is_relative_to(folder.root):
                raise ConfigError(f"{url}: {name!r} would be written outside {folder.root}")
            file.parent.mkdir(parents=True, exist_ok=True)
            with system.open_input_stream(entry.path) as stream:
                file.write_bytes(stream.read())
    return folder.root
