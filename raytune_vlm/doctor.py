"""`raytune-vlm doctor`: what is wrong with this machine for a sweep, and what to do about it.

Every check returns findings; a finding that is not `ok` has a remedy.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import shutil
import socket
import stat
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.version import Version

TESTED = {
    "click": "8.5.1",
    "datasets": "5.2.0",
    "jinja2": "3.1.6",
    "jsonschema": "4.26.0",
    "matplotlib": "3.11.2",
    "numpy": "2.4.6",
    "optuna": "5.0.0",
    "peft": "0.21.2",
    "pillow": "13.0.0",
    "pyarrow": "26.0.0",
    "pydantic": "2.14.3",
    "pyyaml": "6.0.3",
    "rapidfuzz": "3.14.6",
    "ray": "2.60.0",
    "rich": "15.0.0",
    "safetensors": "0.8.0",
    "simplejpeg": "1.9.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
"""What the tests were last run with: the dependencies' pins of `constraints/cpu.txt`."""

GIB = 2**30
SPACE_NEEDED, SPACE_WANTED = GIB, 20 * GIB
OPEN_FILES_WANTED = 8192
RAY_FULL, RAY_NEARLY_FULL = 0.95, 0.9
"""Shares of a disk: at the first Ray stops writing objects to it."""

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
HEAD_PORTS = {6379: "--port", 8265: "--dashboard-port", 10001: "--ray-client-server-port"}
"""Ports that `ray start --head` takes, and the option that gives each another one."""

CONNECT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "problem"]
    about: str
    what: str
    remedy: str = ""


def examine(storage: Path, address: str | None) -> Iterator[Finding]:
    """Every finding on this machine.

    Parameters
    ----------
    storage
        Where sweep folders are to be kept.
    address
        Of a cluster's dashboard; None: of a Ray on this machine, if there is one.
    """
    yield from check_versions()
    yield from check_extras()
    yield from check_gpus()
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    yield from check_folder("storage", storage)
    yield from check_folder("model cache", hub)
    yield from check_ray_disk(Path(os.environ.get("RAY_TMPDIR", "/tmp")))
    yield from check_shared_memory(Path("/dev/shm"))
    yield check_open_files()
    yield from check_token()
    running = list(check_dashboard(address))
    yield from running
    yield from check_ray_address()
    if len(running) == 1 and running[0].what.startswith("nothing answers"):
        yield from check_ports()


def check_versions() -> Iterator[Finding]:
    """Python and every dependency: against the least that is needed, and what was tested."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", "python", python)
    try:
        needed = map(Requirement, metadata.requires("raytune-vlm") or [])
        floors = {each.name: each for each in needed if each.marker is None}
    except metadata.PackageNotFoundError:
        yield Finding("ok", "raytune-vlm", "runs from a folder, without being installed")
        floors = {}
    for name, tested in TESTED.items():
        yield _version(name, floors.get(name), tested)


def _version(name: str, needed: Requirement | None, tested: str) -> Finding:
    install = f"pip install '{name}=={tested}'"
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("problem", name, "is not installed", install)
    if needed is not None and not needed.specifier.contains(found, prereleases=True):
        return Finding("problem", name, f"{found}, and {needed.specifier} is needed", install)
    # The build of torch for a device is the same version: 2.13.0+cu130.
    if Version(found).release[:2] != Version(tested).release[:2]:
        what = f"{found}; tested with {tested}"
        return Finding("warning", name, what, f"where it misbehaves: {install}")
    return Finding("ok", name, f"{found} (tested with {tested})")


def check_extras() -> Iterator[Finding]:
    """Which optional parts are installed."""
    try:
        needed = [Requirement(text) for text in metadata.requires("raytune-vlm") or []]
    except metadata.PackageNotFoundError:
        return
    for each in needed:
        extras = [name for name in EXTRAS if each.marker and each.marker.evaluate({"extra": name})]
        for extra in extras:
            try:
                yield Finding("ok", each.name, f"{metadata.version(each.name)} ({EXTRAS[extra]})")
            except metadata.PackageNotFoundError:
                how = f"not installed; for {EXTRAS[extra]}: pip install 'raytune-vlm[{extra}]'"
                yield Finding("ok", each.name, how)


EXTRAS = {
    "deepspeed": "train.backend: deepspeed",
    "gpu": "families whose processors need torchvision",
    "qlora": "model.quantization",
    "searchers": "the searchers cmaes and gp",
    "dashboards": "Optuna's dashboard",
    "trackers": "report.trackers",
    "documents": "sources of type pdf",
}
"""Optional parts of the package -> what they are for."""


def check_gpus() -> Iterator[Finding]:
    """Whether torch sees the GPUs of the machine, and what they can do."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            text = f"{about.name}, {about.total_memory / GIB:.0f} GiB"
            if about.major >= 8:
                yield Finding("ok", f"gpu {number}", text)
            else:
                remedy = "model.dtype=float16"
                yield Finding("warning", f"gpu {number}", f"{text}, without bfloat16", remedy)
        return
    if not Path("/proc/driver/nvidia/version").exists():
        yield Finding("ok", "gpu", "none: everything runs on the CPU")
    elif torch.version.cuda is None:
        remedy = "make install CONSTRAINTS=   (takes the build of torch for the machine)"
        what = f"there is an NVIDIA driver, but torch {torch.__version__} is built for the CPU"
        yield Finding("problem", "gpu", what, remedy)
    else:
        what = f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) sees no device"
        remedy = "see `nvidia-smi` and CUDA_VISIBLE_DEVICES; the driver may be older than that CUDA"
        yield Finding("problem", "gpu", what, remedy)


def check_folder(about: str, folder: Path) -> Iterator[Finding]:
    """Whether files can be written, synced and renamed in a folder, and how much room there is."""
    there = folder.absolute()
    while not there.is_dir() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".raytune_vlm-") as place:
            written = Path(place) / "written"
            with written.open("xb") as stream:
                stream.write(b"0")
                os.fsync(stream.fileno())
            written.replace(Path(place) / "renamed")
    except OSError as error:
        what = f"{folder}: nothing can be written in {there} ({error.strerror})"
        yield Finding("problem", about, what, "give another folder, or the right to write")
        return
    mode = there.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        what = f"every user of this machine can replace files in {there}"
        yield Finding("warning", about, what, f"chmod o-w {there}")
    free = shutil.disk_usage(there).free
    text = f"{folder}: {free / GIB:,.1f} GiB free"
    if free < SPACE_WANTED:
        level: Literal["warning", "problem"] = "warning" if free >= SPACE_NEEDED else "problem"
        remedy = "make room: checkpoints, the prepared data and models lie there"
        yield Finding(level, about, text, remedy)
    else:
        yield Finding("ok", about, text)


def check_ray_disk(folder: Path) -> Iterator[Finding]:
    """Whether the disk of Ray's temporary files is nearly full."""
    if not folder.is_dir():
        yield Finding("problem", "RAY_TMPDIR", f"{folder} is no folder", "make it, or unset it")
        return
    usage = shutil.disk_usage(folder)
    share = 1 - usage.free / usage.total
    text = f"{folder}: {share:.0%} of the disk used"
    if share > RAY_NEARLY_FULL:
        what = f"{text}; above {RAY_FULL:.0%} Ray writes no objects there, and sweeps stand still"
        level: Literal["warning", "problem"] = "problem" if share > RAY_FULL else "warning"
        yield Finding(level, "ray's files", what, "make room, or set RAY_TMPDIR to another disk")
    else:
        yield Finding("ok", "ray's files", text)


def check_shared_memory(folder: Path) -> Iterator[Finding]:
    """Whether Ray's object store fits into shared memory; else Ray puts it onto a disk."""
    from ray._common.utils import get_system_memory
    from ray._private.ray_constants import (
        DEFAULT_OBJECT_STORE_MEMORY_PROPORTION,
        REQUIRE_SHM_SIZE_THRESHOLD,
    )

    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    share = get_system_memory() * DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
    needed = min(share, REQUIRE_SHM_SIZE_THRESHOLD)
    text = f"{folder}: {free / GIB:,.1f} GiB free"
    if free < needed:
        remedy = (
            f"docker run --shm-size={needed * 1.1 / GIB:.0f}g, on Kubernetes an emptyDir of medium "
            "Memory at /dev/shm"
        )
        what = f"{text}, and Ray wants {needed / GIB:,.1f} GiB; it would use a disk instead"
        yield Finding("warning", "shared memory", what, remedy)
    else:
        yield Finding("ok", "shared memory", text)


def check_open_files() -> Finding:
    """How many files a process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES_WANTED:
        return Finding("warning", "open files", f"at most {soft}", "ulimit -n 65536")
    return Finding("ok", "open files", "no limit" if soft < 0 else f"at most {soft}")


def check_token() -> Iterator[Finding]:
    """Whether a Ray that is started here asks for a token, and who can read the token."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    there = bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()
    make = "ray get-auth-token --generate"
    if mode == "token" and not there:
        what = f"RAY_AUTH_MODE=token, but there is no token in {file}"
        yield Finding("problem", "ray token", what, f"{make}, or copy the cluster's there")
    elif mode == "token" or (not mode and there):
        yield Finding("ok", "ray token", "Ray asks for one, and there is one")
    else:
        why = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set, and there is no token"
        what = f"{why}: whoever reaches a Ray started here by `ray start` runs code on it"
        yield Finding("warning", "ray token", what, f"{make}; export RAY_AUTH_MODE=token")
    if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        what = f"other users of this machine can read {file}"
        yield Finding("warning", "ray token", what, f"chmod 600 {file}")


def check_dashboard(address: str | None) -> Iterator[Finding]:
    """Whether a dashboard lets in everybody who reaches it: who does can run code on the cluster.

    Without an address, one on this machine: also whether it answers at another than its own
    loopback address.
    """
    wanted = address or DEFAULT_DASHBOARD
    parts = urlsplit(wanted)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        yield Finding("problem", "dashboard", f"{wanted} is no address", f"as {DEFAULT_DASHBOARD}")
        return
    answer = _status(wanted)
    if answer is None:
        level: Literal["ok", "problem"] = "ok" if address is None else "problem"
        remedy = "" if address is None else "ssh -L 8265:127.0.0.1:8265 HEAD, or start the cluster"
        yield Finding(level, "dashboard", f"nothing answers at {wanted}", remedy)
        return
    for host in [parts.hostname, *_own_address(parts.hostname)]:
        place = f"{parts.scheme}://{host}:{parts.port or 80}"
        yield from _exposure(place, host, parts.scheme, answer if host == parts.hostname else None)


def open_to_all(address: str) -> str | None:
    """What is wrong with a dashboard on a network that asks for no token; None if it is none."""
    found = [each.what for each in check_dashboard(address) if each.what.endswith(_OPEN)]
    return found[0] if found else None


_OPEN = "asks for no token: whoever reaches it runs code there"


def _exposure(place: str, host: str, scheme: str, answer: int | None) -> Iterator[Finding]:
    """What it means that a dashboard answers at a place, if it does."""
    answer = answer or _status(place)
    bind = "ray start --dashboard-host=127.0.0.1, and reach it by ssh -L 8265:127.0.0.1:8265 HEAD"
    if answer is None:
        return
    if answer in (401, 403):
        if _is_loopback(host) or scheme == "https":
            yield Finding("ok", "dashboard", f"{place} asks for a token")
        else:
            what = f"{place} asks for a token, which travels there unencrypted"
            yield Finding("warning", "dashboard", what, bind)
    elif _is_loopback(host):
        what = f"{place} asks for no token; only users of this machine reach it"
        yield Finding("ok", "dashboard", what)
    else:
        what = f"{place} is on a network and {_OPEN}"
        yield Finding("warning", "dashboard", what, f"{bind}; RAY_AUTH_MODE=token")


def check_ray_address() -> Iterator[Finding]:
    """Whether the cluster that sweeps would join, because of RAY_ADDRESS, is there."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isdigit():
        return
    if _connects(host, int(port)):
        yield Finding("ok", "RAY_ADDRESS", f"{address}: sweeps join this cluster")
    else:
        what = f"{address}: nothing answers, and sweeps would try to join it"
        yield Finding("problem", "RAY_ADDRESS", what, "unset RAY_ADDRESS, or start the cluster")


def check_ports() -> Iterator[Finding]:
    """Whether a head node could be started here with Ray's usual ports."""
    taken = [port for port in HEAD_PORTS if _connects("127.0.0.1", port)]
    for port in taken:
        remedy = f"ray start --head {HEAD_PORTS[port]}=ANOTHER, if a head is to be started here"
        yield Finding("warning", "ports", f"{port} is in use by another program", remedy)
    if not taken:
        yield Finding("ok", "ports", f"{', '.join(map(str, HEAD_PORTS))} are free")


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy sees another loopback address than this machine's."""


def _status(address: str) -> int | None:
    """HTTP status of the list of jobs, asked for without a token; None if nothing answers."""
    url = f"{address.rstrip('/')}/api/jobs/"
    try:
        with _DIRECT.open(url, timeout=CONNECT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _own_address(host: str) -> list[str]:
    """This machine's address on its network, if `host` is its loopback address."""
    if not _is_loopback(host):
        return []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only picks the interface
            own = str(probe.getsockname()[0])
        except OSError:
            return []
    return [] if _is_loopback(own) else [own]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S):
            return True
    except OSError:
        return False
