"""Features of images on a node's own disk, shared by its executors, later sweeps and resumes.

    <root>/<tower_digest>/<time>-<random>.features.arrow

Segments are written under a temporary name, synced and renamed, and never changed. All executors
map them, so what several read is in memory once, in the page cache. Two that compute the same
image at once both write it, and either copy is good. A segment may be deleted at any time: who has
mapped it goes on reading it.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from os import utime
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch

from raytune_vlm.collate.feature_segment import Segment, packed, unpacked, write_segment
from raytune_vlm.collate.tower_digest import tower_digest
from raytune_vlm.models.loading import Base
from raytune_vlm.monitor import Say

SEGMENT_BYTES = 64 * 10**6
"""A segment is written when it would have so many bytes, ..."""

WRITE_EVERY_S = 60.0
"""... or when its first features have waited so long."""

IN_USE_S = 600.0
"""So long after its last use a segment is kept, whatever room is wanted: images whose features are
more than the room would else drive each other out, epoch after epoch."""

LEFT_FREE = 0.05
"""Share of the disk that stays free: of checkpoints, and Ray writes no objects to a fuller one."""

NOTE_USE_S = 60.0
"""How often the use of a segment is noted, in its time of change."""

UNFINISHED_S = 3600.0
"""So long after the last write to it, nobody is at work on a temporary file any more."""

SEGMENTS = "[0-9]*.features.arrow"

NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
           "smb3", "smbfs", "wekafs"}  # fmt: skip
"""File systems on which a mapped file that another machine deletes kills the process."""


def open_store(
    root: Path, base: Base, device: str, max_bytes: int, say: Say
) -> FeatureStore | None:
    """The store of a model's tower; None, with the reason said, where there can be none.

    Parameters
    ----------
    root
        Folder for the stores of all towers, which are of at most `max_bytes` together.
    """
    try:
        kind = file_system_of(root)
        if kind in NETWORK or (kind.startswith("fuse.") and "overlay" not in kind):
            say(
                f"features of images are not kept on disk: {root} is on {kind}, which is not this "
                "machine's own; give a folder that is as train.feature_disk_folder"
            )
            return None
        folder = root / tower_digest(base, device)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(root, say)
    except OSError as error:
        say(f"features of images are not kept on disk: {error}")
        return None
    return FeatureStore(folder, max_bytes, say)


def file_system_of(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that a folder is on, as Linux names it; empty where none is told."""
    if not mounts.exists():
        return ""
    mounted, kind, there = "", "", folder.resolve()
    for line in mounts.read_text().splitlines():
        _, place, found, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if len(place) >= len(mounted) and there.is_relative_to(place):
            mounted, kind = place, found
    return kind


def _remove_unfinished(root: Path, say: Say) -> None:
    """Remove what executors that were killed had begun to write."""
    for file in root.glob(f"*/.{SEGMENTS}"):
        with suppress(FileNotFoundError):  # somebody else does the same
            if file.stat().st_mtime < time.time() - UNFINISHED_S:
                file.unlink()
                say(f"{file} was never finished and is deleted")


class FeatureStore:
    """The features that one tower makes of images; see `open_store`.

    Nothing is taken from it before the first `put`, which is compared with what is there.

    Parameters
    ----------
    folder
        Of this tower. The folders beside it count for `max_bytes` too.
    say
        Told when something is lost, and once, why nothing is read or written any more.
    """

    def __init__(self, folder: Path, max_bytes: int, say: Say) -> None:
        self.folder, self._max_bytes, self._say = folder, max_bytes, say
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 8)
        self._kind: Any = None
        """The class of the features."""
        self._segments: dict[str, Segment] = {}
        self._used: dict[str, float] = {}
        """Segment -> when its use was noted last."""
        self._index: dict[bytes, tuple[Segment, int]] = {}
        self._seen_ns = 0
        self._pending: dict[bytes, Any] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        self._reads = self._writes = True
        self._is_full = False

    def get(self, key: bytes) -> Any:
        """The features with a key, views of the mapped file; None where there are none."""
        if key in self._pending:
            return self._pending[key]
        found = self._read(key) if self._kind is not None else None
        return None if found is None else unpacked(self._kind, *found)

    def put(self, key: bytes, features: Any) -> None:
        """Keep features that were computed, in the memory of the process; `get` had none."""
        self._kind = type(features)
        layout, parts = packed(features)
        there = self._read(key)
        if there is not None:
            if (there[0], there[1].numpy().tobytes()) != (layout, b"".join(parts)):
                self._leave("they differ from those computed of the same image; delete it")
            return
        if not self._writes:
            return
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending[key] = features
        self._pending_bytes += sum(map(len, parts))
        waited = time.monotonic() - self._pending_since
        if self._pending_bytes >= self._segment_bytes or waited >= WRITE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits for it."""
        pending, size = self._pending, self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        if not pending or not self._writes:
            return
        file = self.folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.features.arrow"
        try:
            if self._has_room(size):
                write_segment(file, pending)
        except OSError as error:
            self._writes = False
            self._say(f"features of images are no longer written to {self.folder}: {error}")

    def _has_room(self, wanted: int) -> bool:
        """Delete segments of any tower, the longest unused first, until there is room."""
        files, root = [], self.folder.parent
        for file in root.glob(f"*/{SEGMENTS}"):
            with suppress(FileNotFoundError):  # deleted just now
                state = file.stat()
                files.append((state.st_mtime, state.st_size, file))
        total, disk = sum(size for _, size, _ in files), disk_usage(root)
        lacking = wanted + max(total - self._max_bytes, int(LEFT_FREE * disk.total) - disk.free)
        for used, size, file in sorted(files):
            if lacking <= 0 or used > time.time() - IN_USE_S:
                break
            file.unlink(missing_ok=True)
            lacking -= size
        if lacking > 0 and not self._is_full:
            self._is_full = True
            self._say(
                f"no room for more features of images in {root}: {total / 1e9:.3g} GB of them are "
                f"in use, {disk.free / 1e9:.3g} GB of the disk are free (train.feature_disk_gb); "
                "the others are computed again"
            )
        return lacking <= 0

    def _read(self, key: bytes) -> tuple[str, torch.Tensor] | None:
        """Layout and bytes of an entry."""
        if not self._reads:
            return None
        try:
            if key not in self._index:
                self._look()
            if key not in self._index:
                return None
            segment, row = self._index[key]
            self._note_use(segment.file)
            try:
                return segment.at(row)
            except ValueError as error:
                self._drop(segment.file, error)
                return None
        except OSError as error:
            self._leave(str(error))
            return None

    def _note_use(self, file: Path) -> None:
        now = time.time()
        if now - self._used.get(file.name, 0.0) > NOTE_USE_S:
            self._used[file.name] = now
            with suppress(OSError):  # deleted, another user's, on a disk for reading only
                utime(file)

    def _look(self) -> None:
        """Take in the segments written since the last look, and let go of those deleted."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._seen_ns:
            return
        # Clocks of file systems tick every few milliseconds.
        self._seen_ns = changed if time.time_ns() - changed > 2 * 10**7 else 0
        there = {file.name: file for file in self.folder.glob(SEGMENTS)}
        for name in self._segments.keys() - there.keys():
            self._forget(name)
        for name in sorted(there.keys() - self._segments.keys()):
            try:
                segment = Segment(there[name])
            except FileNotFoundError:
                continue  # deleted just now
            except ValueError as error:
                self._drop(there[name], error)
                continue
            self._segments[name] = segment
            for row, key in enumerate(segment.keys):
                self._index.setdefault(key, (segment, row))

    def _forget(self, name: str) -> None:
        segment = self._segments.pop(name, None)
        self._used.pop(name, None)
        if segment is not None:
            places = self._index.items()
            self._index = {key: place for key, place in places if place[0] is not segment}

    def _drop(self, file: Path, error: ValueError) -> None:
        """Delete a file that cannot be trusted."""
        self._forget(file.name)
        if file.exists():
            file.unlink(missing_ok=True)
            self._say(f"{file} is damaged and is deleted: {error}")

    def _leave(self, reason: str) -> None:
        self._reads = self._writes = False
        self._say(f"features of images in {self.folder} are no longer used: {reason}")
