"""Sources in an object store: a real S3 server, in a process of its own on this machine."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from test_sources import (
    LIMITS,
    OPTIONS,
    Result,
    config_of,
    lines,
    make,
    make_tar,
    png,
    read,
    reasons,
    row_of,
)

from raytune_vlm.errors import DataError, InfrastructureError
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import SOURCES, remote

pytest.importorskip("moto")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of a server that speaks S3, with nothing in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


def point_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in [
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "eu-central-1"),
        ("AWS_ENDPOINT_URL", address),
    ]:
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    point_to(monkeypatch, endpoint)
    system = pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint, region="eu-central-1", allow_bucket_creation=True
    )
    system.create_dir("bucket")
    return system


def upload(system: Any, folder: Path, to: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with system.open_output_stream(f"{to}/{file.relative_to(folder).as_posix()}") as stream:
                stream.write(file.read_bytes())


def comparable(found: list[Result], start: str) -> list[Any]:
    """Samples and reasons, with the place where they were found cut off."""
    return [dataclasses.replace(item, origin=item.origin.removeprefix(start)) for item in found]


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind not in ("sroie", "python")])
def test_what_is_read_from_the_store_is_what_is_read_from_the_disk(
    kind: str, store: Any, tmp_path: Path
) -> None:
    path, _, _ = make(kind, tmp_path)
    upload(store, tmp_path, f"bucket/{kind}")
    url = f"s3://bucket/{kind}/{path.name}"
    local = read(kind, path, tmp_path)
    assert comparable(read(kind, url, Path(), network=True), f"s3://bucket/{kind}/") == local
    assert len(read(kind, url, Path(), network=True, max_samples=2)) == 2


def test_every_container_is_read_from_the_store(store: Any, tmp_path: Path) -> None:
    rows = [{"image": "a.png", "text": f"t{n}"} for n in range(3)]
    (tmp_path / "a.png").write_bytes(png())
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "c.parquet")
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "deep").mkdir()
    make_tar(tmp_path / "deep" / "x.tgz", ("0.png", png()), ("0.txt", b"t"), mode="w:gz")
    upload(store, tmp_path, "bucket/all")
    local = read("image_text", tmp_path, Path())
    assert len(local) == 12
    for path in ("s3://bucket/all", "s3://bucket/all/", "s3://bucket/all/*"):
        found = read("image_text", path, Path(), network=True)
        start = "s3://bucket/all/"
        assert comparable(found, start) == comparable(local, f"{tmp_path}/")
    (sample,) = read("webdataset", "s3://bucket/**/*.tgz", Path(), network=True)
    assert isinstance(sample, Sample)
    assert sample.origin == "s3://bucket/all/deep/x.tgz:0"


def test_a_saved_dataset_and_a_function_of_ones_own(store: Any, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pa.ipc.new_stream(
        str(tmp_path / "train" / "data-0.arrow"), pa.schema({"text": pa.string()})
    ) as writer:
        writer.write_table(pa.table({"text": ["t"]}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "train" / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data-0.arrow"}]}
    (tmp_path / "train" / "state.json").write_text(json.dumps(state))
    upload(store, tmp_path, "bucket/saved")
    (found,) = read("image_text", "s3://bucket/saved", Path(), network=True)
    assert (found.origin, reasons([found])) == (
        "s3://bucket/saved/train/data-0.arrow:1",
        ["no column 'image' (known: text)"],
    )
    config = config_of("python", "s3://bucket/saved/train/state.json")
    (shard,) = SOURCES["python"].list_shards(config, Path(), True)
    assert shard.path == config.path
    assert OPTIONS["python"]["function"] == config.function


def test_rows_of_the_store_stay_in_their_folder(store: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    names = ["../secret.png", str(secret), "s3://bucket/secret.png", "gone.png"]
    lines(tmp_path / "x.jsonl", *({"image": name, "text": "t"} for name in names))
    upload(store, tmp_path, "bucket/set")
    with store.open_output_stream("bucket/secret.png") as stream:
        stream.write(png())
    found = reasons(read("image_text", "s3://bucket/set/x.jsonl", Path(), network=True))
    assert [reason.split(":")[0] for reason in found] == [
        "image is outside the source's folder",
        "image is outside the source's folder",
        "image is a URL, which rows may not name",
        "image not found",
    ]


def test_a_file_that_changes_has_another_digest(store: Any, tmp_path: Path) -> None:
    def digest() -> str:
        config = config_of("image_text", "s3://bucket/changing/x.jsonl")
        (shard,) = SOURCES["image_text"].list_shards(config, Path(), True)
        return shard.digest

    lines(tmp_path / "x.jsonl", row_of("image_text", 0))
    upload(store, tmp_path, "bucket/changing")
    first = digest()
    assert first == digest()
    lines(tmp_path / "x.jsonl", row_of("image_text", 0), row_of("image_text", 1))
    upload(store, tmp_path, "bucket/changing")
    assert digest() != first


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "sroie"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://nobucket/x", "source s3://nobucket/x.* not found"),
        ("s3://bucket/nothing/x", "source s3://bucket/nothing/x.* not found"),
    ],
)
def test_what_is_not_in_the_store_is_one_line(
    kind: str, path: str, message: str, store: Any
) -> None:
    suffix = {"webdataset": ".tar", "llamafactory": ""}.get(kind, ".jsonl")
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        read(kind, path + suffix, Path(), network=True)
    assert "\n" not in caught.value.message
    assert time.monotonic() - began < 5
    with pytest.raises(DataError, match=r"needs the network: set data\.allow_network: true"):
        read(kind, path + suffix, Path())


def test_the_nearest_name_is_told(store: Any, tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", row_of("image_text", 0))
    upload(store, tmp_path, "bucket/near")
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'\?"):
        read("image_text", "s3://bucket/near/trian.jsonl", Path(), network=True)
    with pytest.raises(DataError, match=r"did you mean 'near'\?"):
        read("image_text", "s3://bucket/naer/*.jsonl", Path(), network=True)
    with pytest.raises(DataError, match="nothing found with a supported suffix"):
        read("image_text", "s3://bucket/near/*.parquet", Path(), network=True)


@pytest.mark.parametrize("path", ["s3://bucket/x.jsonl", "s3://bucket/*.jsonl", "s3://bucket"])
def test_a_store_that_does_not_answer_is_one_line(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be listed: OSError: .*NETWORK_CONNECTION"):
        read("image_text", path, Path(), network=True)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.arrow", "x.tar", "y.jsonl"])
def test_a_store_that_goes_away_is_not_a_flaw_of_the_data(
    name: str, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a shard would be remembered as bad."""
    row = {"image": "a.png", "text": "t"}
    (tmp_path / "a.png").write_bytes(png())
    lines(tmp_path / "x.jsonl", row)
    lines(tmp_path / "y.jsonl", *[row] * 9)
    table = pa.Table.from_pylist([row])
    pq.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    make_tar(tmp_path / "x.tar", ("0.png", png()), ("0.txt", b"t"))
    upload(store, tmp_path, "bucket/going")
    kind = "webdataset" if name == "x.tar" else "image_text"
    config = config_of(kind, f"s3://bucket/going/{name}")
    (shard,) = SOURCES[kind].list_shards(config, Path(), True)
    found = SOURCES[kind].read_shard(config, shard, LIMITS)
    if name == "y.jsonl":
        assert isinstance(next(found), Sample)
    point_to(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(InfrastructureError, match=r"cannot be read: OSError: .*NETWORK_CONN"):
        list(found)


def test_a_file_that_is_gone_costs_its_shard(store: Any, tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl", row_of("image_text", 0))
    upload(store, tmp_path, "bucket/gone")
    config = config_of("image_text", "s3://bucket/gone/x.jsonl")
    (shard,) = SOURCES["image_text"].list_shards(config, Path(), True)
    store.delete_file("bucket/gone/x.jsonl")
    (found,) = SOURCES["image_text"].read_shard(config, shard, LIMITS)
    assert isinstance(found, Quarantined)
    assert found.reason.startswith("unreadable file: ")
    assert found.origin == "s3://bucket/gone/x.jsonl"


def test_s3_needs_no_further_package() -> None:
    assert "s3fs" not in sys.modules
    assert "s3" in remote.REMOTE_SCHEMES
