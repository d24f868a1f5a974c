"""Files behind URLs: object stores and the Hugging Face hub, read as local files are.

`s3://` is pyarrow's own client, so that it needs no further package: credentials, region and
endpoint come from the standard variables (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL` for
other stores than Amazon's, ...) and `~/.aws`. The other schemes are fsspec's, which names the
package that it needs (`gcsfs`, `adlfs`).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Sequence
from typing import IO, Any

import fsspec  # type: ignore[import-untyped]

from raytune_vlm.errors import DataError, InfrastructureError, did_you_mean
from raytune_vlm.sources.base import shorten

REMOTE_SCHEMES = frozenset({"abfs", "abfss", "az", "gcs", "gs", "hf", "memory", "s3"})
"""URL schemes that a source may have with `data.allow_network` (`memory`: fsspec's, for tests)."""

CONNECT_SECONDS = 5
REQUEST_SECONDS = 30
NUM_ATTEMPTS = 3
"""What a store gets before it counts as unreachable."""

_BUFFER_BYTES = 1 << 20
_STATE_KEYS = ("mtime", "LastModified", "last_modified", "created", "ETag", "etag", "blob_id")


def is_remote(path: str) -> bool:
    """Whether this is a URL."""
    return "://" in path


def find_remote(url: str, allow_network: bool, suffixes: Sequence[str]) -> list[tuple[str, str]]:
    """The files of a URL, a folder or a glob, sorted: each with a hash of its state.

    Raises DataError where there is none, the store cannot be reached, or the network is not
    allowed.
    """
    scheme = url.split("://", 1)[0]
    if scheme not in REMOTE_SCHEMES or "::" in url:
        raise DataError(
            f"source {url}: unknown scheme '{scheme}://'{did_you_mean(scheme, REMOTE_SCHEMES)}"
        )
    if not allow_network:
        raise DataError(f"source {url} needs the network: set data.allow_network: true")
    try:
        system, path = _system_of(url)
        entries = _list(system, path)
    except FileNotFoundError as error:
        raise DataError(f"source {url} not found{shorten(error, 300)}") from error
    except Exception as error:  # a missing driver, credentials, the network
        detail = f"{type(error).__name__}: {shorten(error, 240)}"
        raise DataError(f"source {url} cannot be listed: {detail}") from error
    found = sorted(
        (str(system.unstrip_protocol(entry["name"])), _state(entry))
        for entry in entries
        if entry["type"] == "file"
        and not posixpath.basename(entry["name"]).startswith((".", "_"))
        and (not suffixes or entry["name"].lower().endswith(tuple(suffixes)))
    )
    if not found:
        kinds = f" with a supported suffix ({', '.join(suffixes)})" if suffixes else ""
        raise DataError(f"source {url}: nothing found{kinds}")
    return found


def open_remote(url: str) -> IO[bytes]:
    """Open a URL for reading, with a position that can be set.

    Raises FileNotFoundError, and InfrastructureError where the store fails: that is no flaw of the
    data, so it must not be remembered as one. Reading raises the latter too.
    """
    try:
        system, path = _system_of(url)
        if url.startswith("s3://"):
            stream = system.fs.open_input_file(path)
        else:
            stream = system.open(path, "rb")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _failure(url, error) from error
    return io.BufferedReader(_Remote(url, stream), _BUFFER_BYTES)


class _Remote(io.RawIOBase):
    """A stream of a file system whose errors, each of its own kind, become InfrastructureError."""

    def __init__(self, url: str, stream: Any) -> None:
        self._url, self._stream = url, stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:
            raise _failure(self._url, error) from error
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._stream.seek(offset, whence)
        return int(self._stream.tell())

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _failure(url: str, error: Exception) -> InfrastructureError:
    detail = f"{type(error).__name__}: {shorten(error, 240)}"
    return InfrastructureError(f"{url} cannot be read: {detail}")


def _list(system: Any, path: str) -> list[dict[str, Any]]:
    """The entries of a file, folder or glob; raises FileNotFoundError with the nearest name."""
    parts = path.split("/")
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    anchor = "/".join(parts[:fixed])
    try:
        entry = system.info(anchor)  # unlike `glob` and `isdir` it tells trouble from absence
    except FileNotFoundError:
        raise FileNotFoundError(_nearest(system, anchor)) from None
    if fixed < len(parts):
        return list(system.glob(path, detail=True).values())
    if entry["type"] == "directory":
        return list(system.ls(path, detail=True))
    return [entry]


def _nearest(system: Any, path: str) -> str:
    parent, name = posixpath.split(path.rstrip("/"))
    try:
        names = [posixpath.basename(entry.rstrip("/")) for entry in system.ls(parent, detail=False)]
    except Exception:  # the folder or the bucket is missing too, or nobody may list it
        return f": '{parent}' is not there either, or may not be listed"
    return f": no '{name}' in '{parent}'{did_you_mean(name, names)}"


def _state(entry: dict[str, Any]) -> str:
    """A hash of what the store says of a file, so that a changed one is known by it."""
    said = [str(entry.get("size")), *(str(entry.get(key)) for key in _STATE_KEYS)]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


def arrow_system(url: str) -> tuple[Any, str]:
    """The pyarrow file system of a URL or a local path, and the path in it.

    Raises DataError for a scheme that is not known.
    """
    from pyarrow import fs

    if not is_remote(url):
        return fs.LocalFileSystem(), os.path.abspath(url)  # noqa: PTH100 - as pyarrow has paths
    scheme = url.split("://", 1)[0]
    if scheme not in REMOTE_SCHEMES:
        raise DataError(
            f"{url}: unknown scheme '{scheme}://'{did_you_mean(scheme, REMOTE_SCHEMES)}"
        )
    system, path = _system_of(url)
    if url.startswith("s3://"):
        return system.fs, path
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def _system_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    if not url.startswith("s3://"):
        system, path = fsspec.core.url_to_fs(url)
        return system, path
    path = url.removeprefix("s3://").rstrip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _s3(path.split("/")[0], endpoint, region), path


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, endpoint: str | None, region: str | None) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
    from pyarrow import fs

    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    client = fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=NUM_ATTEMPTS),
    )
    return ArrowFSWrapper(client)
