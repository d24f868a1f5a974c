"""Names on the Hugging Face hub, read by its own client from a server on this machine."""

import hashlib
import http.server
import io
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import png, read

from raytune_vlm.errors import DataError
from raytune_vlm.records import Sample

REVISIONS = {"main": "0" * 40, "v1": "1" * 40, "refs/convert/parquet": "2" * 40}


def table(text: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [png()], "text": [text]}), buffer)
    return buffer.getvalue()


FILES = {
    f"{name}.parquet": table(name)
    for name in (
        "data/train-00000-of-00001",
        "data/test-00000-of-00001",
        "converted/validation/0000",
        "german/extra/0000",
        "english/extra/0000",
    )
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as reading the repository `a/b` takes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        parts = parts[1:] if parts[0] == "api" else parts
        if parts[:2] != ["datasets", "a"]:
            return self.send(404)
        if parts[2] != "b":
            return self.send(404, code="RepoNotFound")
        kind, revision = parts[3:5] if len(parts) > 4 else ("revision", "main")
        if revision not in REVISIONS:
            return self.send(404, code="RevisionNotFound")
        path = "/".join(parts[5:])
        if kind == "revision":
            return self.send_json({"id": "a/b", "sha": REVISIONS[revision], "siblings": []})
        if kind == "tree":
            return self.send_tree(path, deep="recursive=true" in url.query.lower())
        return self.send_file(path)

    do_HEAD = do_GET

    def send_tree(self, path: str, *, deep: bool) -> None:
        files = [name for name in FILES if name.startswith(path)]
        folders = {str(folder) for name in files for folder in list(Path(name).parents)[:-1]}
        start = len(path) + 1 if path else 0
        names = [
            name
            for name in sorted({*files, *folders})
            if len(name) > start and (deep or "/" not in name[start:])
        ]
        if not names:
            return self.send(404, code="EntryNotFound")
        return self.send_json(
            [
                {
                    "type": "file" if name in FILES else "directory",
                    "path": name,
                    "size": len(FILES.get(name, b"")),
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
                for name in names
            ]
        )

    def send_file(self, path: str) -> None:
        if path not in FILES:
            return self.send(404, code="EntryNotFound")
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if span is None:
            return self.send(200, FILES[path])
        return self.send(206, FILES[path][int(span[1]) : int(span[2]) + 1])

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode())

    def send(self, status: int, content: bytes = b"", code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import HfFileSystem, constants

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        HfFileSystem.clear_instance_cache()
        yield
        HfFileSystem.clear_instance_cache()
        server.shutdown()


def test_hub_names_stand_for_the_parquet_files_of_a_split(hub: None) -> None:
    def origins(path: str, **options: Any) -> list[str]:
        found = read("image_text", path, Path(), network=True, **options)
        assert all(isinstance(item, Sample) for item in found)
        return [item.origin for item in found]

    train, test = (f"/data/{name}-00000-of-00001.parquet" for name in ("train", "test"))
    base = "hf://datasets/a/b"
    assert origins(base, dataset_split="test") == [f"{base}{test}:1"]
    assert origins(base, dataset_split="test", revision="v1") == [f"{base}@v1{test}:1"]
    assert origins(f"{base}@v1/data", dataset_split="train") == [f"{base}@v1{train}:1"]
    assert origins(f"{base}/converted") == [f"{base}/converted/validation/0000.parquet:1"]
    assert origins(base + train) == [f"{base}{train}:1"]
    assert origins(f"{base}/data/*.parquet") == [f"{base}{test}:1", f"{base}{train}:1"]
    convert = {"revision": "refs/convert/parquet", "dataset_split": "test"}
    assert origins(base, **convert) == [f"{base}@refs%2Fconvert%2Fparquet{test}:1"]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("a/b/data", {}, "name one of its splits with dataset_split: test, train"),
        ("a/b", {"dataset_split": "tets"}, r"has no split 'tets' \(did you mean 'test'\?\)"),
        ("a/b", {"dataset_split": "extra"}, "several folders: .* into path: english, german"),
        ("b", {}, "must be hf://datasets/<owner>/<name>"),
        ("a/b@x", {"revision": "v1"}, "names a revision, and so does revision"),
        ("a/b", {"revision": "v2"}, "not found"),
        ("a/c", {}, "not found"),
        ("a/b/dat", {}, r"no 'dat' in 'datasets/a/b' \(did you mean 'data'\?\)"),
        ("a/b/data/x.parquet", {}, "not found: no 'x.parquet'"),
        ("a/b/data/*.json", {}, "nothing found with a supported suffix"),
    ],
)
def test_hub_names_that_are_refused(
    path: str, options: dict[str, Any], message: str, hub: None
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read("image_text", f"hf://datasets/{path}", Path(), network=True, **options)
    assert "\n" not in caught.value.message


def test_the_hub_is_not_asked_without_permission() -> None:
    with pytest.raises(DataError, match=r"needs the network: set data\.allow_network: true"):
        read("image_text", "hf://datasets/a/b", Path(), dataset_split="train")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    HfFileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="cannot be listed: ConnectError") as caught:
        read("image_text", "hf://datasets/a/b", Path(), network=True)
    HfFileSystem.clear_instance_cache()
    assert "\n" not in caught.value.message
