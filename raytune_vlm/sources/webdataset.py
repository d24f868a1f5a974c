"""`webdataset`: tar shards (`.tar`, `.tar.gz`, `.tgz`), each read once from front to end.

Members that follow each other and share a key (folder and name up to the first dot) are a sample:

    0001.jpg  0001.txt                 an image and its text, asked for by `instruction`
    0002.0.png  0002.1.png  0002.json  images in the order of their numbers, and a row

The row of a `.json` member is in the layout of `messages`, of `sharegpt` (`conversations`), or has
a `text` or `caption`. Its placeholders stand for the images of the sample in their order; `images`
and image parts may also name members. Other members have to be named in `ignored_suffixes`; folders
and hidden members (`.x`) are left out. Nothing is ever written to disk.

A damaged or truncated tar gives the samples before the damage (not the one that it is in, nor one
that might go on behind it) and one entry that says where it is.
"""

from __future__ import annotations

import gzip
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import MessagesSource, ShareGptSource, WebDatasetSource
from raytune_vlm.errors import InfrastructureError
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import messages, sharegpt
from raytune_vlm.sources.base import (
    Reader,
    RowError,
    Shard,
    attempt,
    check_counts,
    number_shards,
    question,
    shorten,
)
from raytune_vlm.sources.containers import RawRow
from raytune_vlm.sources.files import find_files, open_binary
from raytune_vlm.sources.rows import Row

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = frozenset({"bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"})
TARGET_SUFFIXES = ("txt", "json")
MAX_TARGET_BYTES = 1 << 26
MAX_SAMPLE_BYTES = 1 << 29
MAX_HEADER_BYTES = 1 << 14
"""Of a header that only says more of the next one (long names, pax): `tarfile` holds it whole, and
before Python 3.11.10 searches it in quadratic time."""

_MORE_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_COLUMNS = ("messages", "conversations", "text", "caption")
_MESSAGES = MessagesSource(type="messages", path="")
_SHAREGPT = ShareGptSource(type="sharegpt", path="")


class _Member(tarfile.TarInfo):
    """A header; one that is damaged is an error, where `tarfile` would take it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise OSError("it ends without its end mark: truncated?") from error
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise OSError(f"damaged header ({error})") from error

    def _proc_member(self, tarfile_: tarfile.TarFile) -> Any:
        if self.type in _MORE_HEADERS and self.size > MAX_HEADER_BYTES:
            raise OSError(f"a header of {self.size} bytes, the limit is {MAX_HEADER_BYTES}")
        return super()._proc_member(tarfile_)  # type: ignore[misc]


@dataclass
class _Group:
    """The members of one key."""

    key: str
    images: dict[str, bytes] = field(default_factory=dict)
    """By what follows the key in the name: `jpg`, `0.jpg`."""
    targets: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""
    """Why the sample is refused already."""
    num_bytes: int = 0


@dataclass(frozen=True)
class _MemberRow(Row):
    """The row of a sample; its images are members of the tar, never files beside it."""

    group: _Group

    @property
    def origin(self) -> str:
        return f"{self.shard.shown}:{shorten(self.group.key)}"

    def load(self, image: Any) -> bytes:
        if isinstance(image, str) and image[:5].lower() != "data:":
            suffix = posixpath.basename(image).removeprefix(
                posixpath.basename(self.group.key) + "."
            )
            if suffix not in self.group.images:
                raise RowError(f"the sample has no image member '{shorten(image)}'")
            image = self.group.images[suffix]
        return super().load(image)


def list_shards(config: WebDatasetSource, root: Path, allow_network: bool) -> list[Shard]:
    """One shard a tar; raises DataError (`find_files`)."""
    shards = find_files(config.path, root, allow_network, TAR_SUFFIXES)
    return number_shards(shards, config.max_samples, partial(_count, config))


def read_shard(
    config: WebDatasetSource, shard: Shard, limits: ImageLimits
) -> Iterator[Sample | Quarantined]:
    """The samples of a tar."""
    for group in islice(_groups(config, shard, limits), shard.limit):
        if isinstance(group, str):
            yield Quarantined(shard.shown, group, config.split)
        else:
            row = _MemberRow(RawRow(0), shard, limits, group)
            yield attempt(row.origin, config.split, partial(_convert, config, row))


def _count(config: WebDatasetSource, shard: Shard, at_most: int) -> int:
    return sum(1 for _ in islice(_groups(config, shard, None), at_most))


def _groups(
    config: WebDatasetSource, shard: Shard, limits: ImageLimits | None
) -> Iterator[_Group | str]:
    """The samples' members, and last what is wrong with the tar; without limits nothing is read."""
    group: _Group | None = None
    name = ""
    try:
        with open_binary(shard.path) as stream:
            for archive, member in _members(stream, zipped=not shard.path.lower().endswith("tar")):
                name = member.name
                key, suffix = _split(name)
                if member.isdir() or posixpath.basename(name).startswith("."):
                    continue
                if group is not None and group.key != key:
                    yield group
                    group = None
                group = group or _Group(key)
                if limits is not None and suffix not in config.ignored_suffixes:
                    _add(group, suffix, member, archive, limits)
    except InfrastructureError:
        raise
    except Exception as error:  # whatever gzip, tarfile and the file system raise
        where = f" after member '{shorten(name)}'" if name else ""
        yield f"unreadable tar{where}: {shorten(error, 160)}"
        return
    if group is not None:
        yield group


def _members(stream: IO[bytes], *, zipped: bool) -> Iterator[tuple[tarfile.TarFile, Any]]:
    source: Any = gzip.GzipFile(fileobj=stream) if zipped else stream
    with tarfile.open(fileobj=source, mode="r|", tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            yield archive, member
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
    while zipped and source.read(1 << 20):  # the checksum stands at the end
        pass


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: `a/b.0.JPG` -> `a/b`, `0.jpg`."""
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def _add(
    group: _Group, suffix: str, member: Any, archive: tarfile.TarFile, limits: ImageLimits
) -> None:
    """Read a member into its group, or note there why the sample is refused."""
    kind = suffix.rpartition(".")[2]
    is_image = kind in IMAGE_SUFFIXES
    name = shorten(posixpath.basename(member.name))
    most = limits.max_bytes if is_image else MAX_TARGET_BYTES
    if not is_image and suffix not in TARGET_SUFFIXES:
        reason = f"unexpected member '{name}': if it is not needed, name it in ignored_suffixes"
    elif not member.isreg():
        reason = f"member '{name}' is a link or a device, not a file"
    elif suffix in group.images or suffix in group.targets:
        reason = f"two members '{name}'"
    elif member.size > most:
        reason = f"member '{name}' has {member.size} bytes, the limit is {most}"
    elif group.num_bytes + member.size > MAX_SAMPLE_BYTES:
        reason = f"the sample has more than {MAX_SAMPLE_BYTES} bytes"
    else:
        content = archive.extractfile(member)
        assert content is not None  # it is a regular file
        (group.images if is_image else group.targets)[suffix] = content.read()
        group.num_bytes += member.size
        return
    group.reason = group.reason or reason


def _convert(config: WebDatasetSource, row: _MemberRow) -> Sample:
    group = row.group
    if group.reason:
        raise RowError(group.reason)
    if not group.targets:
        raise RowError("the sample has no .txt or .json member")
    if config.target is None and len(group.targets) > 1:
        raise RowError("the sample has .txt and .json members: say which with target")
    kind: str = config.target or next(iter(group.targets))
    if kind not in group.targets:
        raise RowError(f"the sample has no .{kind} member")
    images = [group.images[suffix] for suffix in sorted(group.images, key=_natural)]
    try:
        text = group.targets[kind].removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise RowError(f"the .{kind} member is not UTF-8 at byte {error.start + 1}") from error
    if kind == "txt":
        return _pair(config, row, text, images)
    return _from_json(config, row, text, images)


def _pair(config: WebDatasetSource, row: _MemberRow, text: str, images: list[bytes]) -> Sample:
    if not images:
        raise RowError("the sample has no image member")
    asked, answer = question(config.instruction, text.strip())
    asked["content"] = [*({"type": "image"} for _ in images[1:]), *asked["content"]]
    return row.sample([asked, answer], images)


def _from_json(config: WebDatasetSource, row: _MemberRow, text: str, images: list[bytes]) -> Sample:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"malformed JSON: {shorten(error)}") from error
    if not isinstance(values, dict):
        raise RowError(f"the .json member must hold an object, not {type(values).__name__}")
    layout = next((name for name in _COLUMNS if values.get(name) is not None), None)
    filled = {**values, "images": images if values.get("images") is None else values["images"]}
    row = _MemberRow(RawRow(0, filled), row.shard, row.limits, row.group)
    if layout == "messages":
        turns, shown = messages.parse_turns(row.turns("messages"))
        if values.get("images") is None and any(i is not messages.FROM_COLUMN for i in shown):
            names = {i for i in shown if isinstance(i, str) and i[:5].lower() != "data:"}
            check_counts(len(names), len(images))
            return row.sample(turns, shown)
        return messages.convert(_MESSAGES, row)
    if layout == "conversations":
        return sharegpt.convert(_SHAREGPT, row)
    if layout is None:
        raise RowError(f"the .json member has none of {', '.join(_COLUMNS)}")
    return _pair(config, row, row.text(layout), images)


def _natural(suffix: str) -> list[tuple[int, str]]:
    """Numbers by their value: `2.jpg` before `10.jpg`."""
    parts = re.findall(r"\d+|\D+", suffix)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


READER = Reader(list_shards, read_shard)
