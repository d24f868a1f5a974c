"""Every reader of the project as a function of bytes, and valid files to start from.

A `Target` puts the bytes where the reader finds them, calls its public function and gives what was
refused: the reasons of quarantined rows, or of a refused file. What it raises beyond `errors` is a
bug. A new reader is one entry of `TARGETS`; `test_fuzzing.py`, `make fuzz` and
`coverage_guided.py` take it from there.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.config.overrides import parse_override
from raytune_vlm.config.sources import (
    CordSource,
    ImageTextSource,
    LlamaFactorySource,
    MessagesSource,
    PdfSource,
    PromptCompletionSource,
    ShareGptSource,
    SroieSource,
    WebDatasetSource,
)
from raytune_vlm.errors import CheckpointError, ConfigError, DataError
from raytune_vlm.images import ImageError, decode, tiff_length, tiff_page
from raytune_vlm.records import Quarantined
from raytune_vlm.references import read_reference
from raytune_vlm.sources import SOURCES
from raytune_vlm.sweep.ledger import Ledger, replay

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000)


@dataclass(frozen=True)
class Target:
    """A reader to be fuzzed."""

    read: Callable[[bytes, Path], Iterable[str]]
    """Gives what was refused; the folder is empty but for `prepare`."""
    valid: Callable[[], list[bytes]]
    errors: tuple[type[Exception], ...]
    prepare: Callable[[Path], None] = lambda folder: None
    """Puts once into the folder what the reader needs beside the bytes."""
    kind: str = "binary"
    """`json`, `jsonl` and `text` are also changed as what they are, not only as bytes."""


# --- images -------------------------------------------------------------------------------------


def _picture(mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> Image.Image:
    picture = Image.radial_gradient("L").resize(size)
    return picture.convert(mode) if mode != "I;16" else picture.convert("I").convert("I;16")


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    """A small image as a file."""
    buffer = io.BytesIO()
    _picture(mode).save(buffer, format=form, **options)
    return buffer.getvalue()


def _pages(count: int) -> bytes:
    return encoded("TIFF", save_all=True, append_images=[_picture()] * (count - 1))


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    return exif.tobytes()


IMAGES: dict[str, Callable[[], list[bytes]]] = {
    "jpeg": lambda: [
        encoded("JPEG"),
        encoded("JPEG", progressive=True, exif=_exif()),
        encoded("JPEG", "CMYK"),
        encoded("JPEG", "L"),
    ],
    "png": lambda: [
        encoded("PNG", mode, exif=_exif()) for mode in ("RGB", "RGBA", "P", "LA", "1", "I;16")
    ],
    "webp": lambda: [
        encoded("WEBP", exif=_exif()),
        encoded("WEBP", "RGBA", lossless=True),
        encoded("WEBP", save_all=True, append_images=[_picture("L").convert("RGB")]),
    ],
    "gif": lambda: [
        encoded("GIF", "P"),
        encoded("GIF", "P", save_all=True, append_images=[_picture("P").rotate(90)]),
    ],
    "bmp": lambda: [encoded("BMP", mode) for mode in ("RGB", "P", "1", "L")],
    "tiff": lambda: [
        _pages(3),
        *(encoded("TIFF", mode) for mode in ("F", "I;16", "CMYK", "1")),
        *(
            encoded("TIFF", compression=name)
            for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "tiff_adobe_deflate")
        ),
    ],
}


def _image(data: bytes, folder: Path) -> Iterable[str]:
    decode(data, LIMITS)
    return ()


def _tiff_pages(data: bytes, folder: Path) -> Iterable[str]:
    for number in range(1, tiff_length(data, max_pages=20) + 2):
        try:
            tiff_page(data, number, LIMITS)
        except ImageError as error:
            yield error.message


# --- sources ------------------------------------------------------------------------------------


def _source(config: Any, name: str, data: bytes, folder: Path) -> Iterable[str]:
    """Write the file, read the source, and give the reasons and origins of what it refuses."""
    (folder / name).write_bytes(data)
    reader = SOURCES[config.type]
    for shard in reader.list_shards(config, folder, False):
        for found in reader.read_shard(config, shard, LIMITS):
            yield found.origin
            if isinstance(found, Quarantined):
                yield found.reason
                yield found.kind


def _beside(folder: Path) -> None:
    """The files that rows name."""
    (folder / "0.png").write_bytes(encoded("PNG"))
    (folder / "0.pdf").write_bytes(encoded("PDF", resolution=72.0))


def _turns(text: str = "b") -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": text}]


_ASKED = {"role": "user", "content": "?"}
_CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
_TOOL_TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "<image>q"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "four"},
]
_TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}])
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": _turns(), "group_id": "g"},
        {"messages": _TOOL_TURNS, "images": ["0.png"], "tools": _TOOLS},
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "<image>?"},
                {"from": "gpt", "value": "a"},
            ],
            "images": ["0.png"],
            "system": "s",
        }
    ],
    "prompt_completion": [
        {"prompt": "<image>what?", "completion": "b", "images": ["0.png"]},
        {"prompt": _turns()[:1], "completion": _turns()[1:]},
    ],
    "image_text": [{"image": "0.png", "text": "words", "group_id": 7}],
    "cord": [
        {
            "image": "0.png",
            "ground_truth": json.dumps({"gt_parse": {"a": [{"b": "1"}, {"b": "2"}]}}),
        },
        {"image": "0.png", "ground_truth": {"gt_parses": [{"a": "1"}, {"a": "2"}]}},
    ],
    "pdf": [
        {"file": "0.pdf", "page": 1, "text": "a"},
        {
            "file": "0.pdf",
            "page": [1, 1],
            "messages": [{"role": "user", "content": "?"}, *_turns()[1:]],
        },
    ],
}
CONFIGS: dict[str, Callable[[str], Any]] = {
    "messages": lambda path: MessagesSource(type="messages", path=path),
    "sharegpt": lambda path: ShareGptSource(type="sharegpt", path=path),
    "prompt_completion": lambda path: PromptCompletionSource(type="prompt_completion", path=path),
    "image_text": lambda path: ImageTextSource(type="image_text", path=path),
    "cord": lambda path: CordSource(type="cord", path=path, choice="seeded", sort_keys=True),
    "pdf": lambda path: PdfSource(type="pdf", path=path, max_pixels=100_000),
}


def _lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _columns() -> list[Any]:
    """A column of every kind that Arrow knows and a row of three could hold."""
    turns = [_turns()[1:]] * 3
    plain = [
        pa.array(["0.png", "\0\x1b[2J", None]),
        pa.array([encoded("PNG"), b"", None]),
        pa.array([{"bytes": encoded("PNG"), "path": "0.png"}] * 3),
        pa.array([b"\xff\xfe", b"a", b"b"]).view(pa.string()),
        pa.array([["0.png"], [], None]),
        pa.array(turns),
        pa.array([1, 2**62, None]),
        pa.array([float("nan"), float("inf"), 0.5]),
        pa.array([True, False, None]),
        pa.array([10**18, -(10**18), 0]).cast(pa.timestamp("ns", "UTC")),
        pa.array([2**30, -(2**30), 0], pa.int32()).cast(pa.date32()),
        pa.array([1, -1, 10**15]).cast(pa.duration("s")),
        pa.array(["1.5", None, "2"]).cast(pa.decimal128(38, 5)),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        pa.nulls(3),
    ]
    ids = pa.array([b"0" * 16] * 3, pa.binary(16))
    return [*plain, pa.ExtensionArray.from_storage(pa.uuid(), ids)]


def _tables() -> list[pa.Table]:
    words = pa.array(["a", "b", "c"])
    return [
        pa.table({"image": column, "text": words if number % 3 else column, "group_id": words})
        for number, column in enumerate(_columns())
    ]


def _parquet() -> list[bytes]:
    files = []
    for table in _tables():
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=2, compression="snappy")
        files.append(sink.getvalue())
    return files


def _arrow() -> list[bytes]:
    files = []
    for number, table in enumerate(_tables()):
        sink = pa.BufferOutputStream()
        opened = (pa.ipc.new_file, pa.ipc.new_stream)[number % 2]
        with opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        files.append(sink.getvalue().to_pybytes())
    return files


def _tar(form: int = tarfile.PAX_FORMAT) -> bytes:
    members = {
        "a/0.png": encoded("PNG"),
        "a/0.txt": b"words",
        "1.jpg": encoded("JPEG"),
        "1.json": json.dumps({"messages": _turns() if form else _TOOL_TURNS}).encode(),
        f"{'long' * (9 if form == tarfile.USTAR_FORMAT else 40)}.txt": "é".encode(),
        "2.0.png": encoded("PNG"),
        "2.json": json.dumps({"caption": "c"}).encode(),
    }
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.pax_headers = {"comment": "x", "mtime": "1.5"}
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return sink.getvalue()


def _tars() -> list[bytes]:
    return [_tar(form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]


_ENTRY = {
    "mine": {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images", "system": "system"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human"},
    }
}


def _for_llamafactory(folder: Path) -> None:
    _beside(folder)
    (folder / "rows.json").write_text(json.dumps(ROWS["sharegpt"]))


def _for_sroie(folder: Path) -> None:
    for name in ("img", "box"):
        (folder / name).mkdir()
    (folder / "img" / "1.jpg").write_bytes(encoded("JPEG"))


def _for_state(folder: Path) -> None:
    _beside(folder)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "data-0.arrow").write_bytes(_arrow()[0])


def _for_pages(folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(_lines({"file": "x.pdf", "page": [1, 2], "text": "a"}))


def _documents() -> list[bytes]:
    two = encoded("PDF", save_all=True, append_images=[_picture()], resolution=72.0)
    return [two, encoded("PDF", "1", resolution=72.0), _pages(2)]


def _document(data: bytes, folder: Path) -> Iterable[str]:
    (folder / "x.pdf").write_bytes(data)
    return _source(CONFIGS["pdf"]("rows.jsonl"), "y", b"", folder)


def _table(kind: str, suffix: str) -> Callable[[bytes, Path], Iterable[str]]:
    return partial(_source, CONFIGS[kind](f"x{suffix}"), f"x{suffix}")


# --- configuration and sweep folders --------------------------------------------------------------

EXPERIMENT = """\
name: x
model: {name: a/b, dtype: float32}
data:
  root: /data
  max_length: 512
  sources:
    - {type: cord, path: "a/*.parquet", weight: 1e-1}
    - type: sharegpt
      path: b.jsonl
      weight: 2
train: {max_steps: 100, learning_rate: 1e-4}
lora: {rank: 8, alpha: 16}
evaluation: {metrics: [exact_match@strip]}
sweep:
  num_trials: 3
  search_space:
    train.learning_rate: {type: loguniform, lower: 1e-5, upper: 1e-3}
    lora.rank: {type: choice, values: [4, 8]}
"""
OVERRIDES = (
    "train.learning_rate=1e-3",
    "sweep.search_space.lora.rank={type: choice, values: [1, 2]}",
    "data.sources.0.path=x",
    "sweep.scheduler.type=asha",
)


def _experiment(data: bytes, folder: Path) -> Iterable[str]:
    file = folder / "x.yaml"
    file.write_bytes(data)
    load_experiment(file).model_dump_json()
    return ()


def _override(data: bytes, folder: Path) -> Iterable[str]:
    text = data.decode("utf-8", "surrogateescape")
    parse_override(text)
    file = folder / "x.yaml"
    file.write_text(EXPERIMENT)
    load_experiment(file, [text]).model_dump_json()
    return ()


def _ledger(data: bytes, folder: Path) -> Iterable[str]:
    file = folder / "ledger.jsonl"
    file.write_bytes(data)
    replay(file)
    Ledger(file).append("noted")
    replay(file)
    return ()


def _ledgers() -> list[bytes]:
    scored = {"trial_id": "t0001", "step": 5, "scores": {"m": 0.5}, "costs": {"seconds": 1.0}}
    clone = {"trial_id": "t0002", "number": 2, "recipe": {"lora.rank": 8}}
    rows: list[dict[str, Any]] = [
        {"event": "planned", "metric": "m"},
        {"event": "proposed", "trial_id": "t0001", "number": 1, "recipe": {"lora.rank": 4}},
        {"event": "started", "trial_id": "t0001"},
        {"event": "scored", **scored},
        {"event": "promoted", "trial_id": "t0001", "step": 10},
        {"event": "control", "accepted": True, "command": "clone", "clone": clone},
        {"event": "control", "accepted": True, "command": "pause", "trial_id": "t0001"},
        {"event": "stopped", "trial_id": "t0001", "message": "m"},
        {"event": "infeasible", "trial_id": "t0002", "message": "m"},
    ]
    return [_lines(*({"seq": n, "time": 1.0, **row} for n, row in enumerate(rows, 1)))]


def _reference(data: bytes, folder: Path) -> Iterable[str]:
    found = read_reference(data.decode("utf-8", "surrogatepass" if data.isascii() else "replace"))
    read_reference(found.to_text())
    return ()


_REFERENCE = {
    "answers": ["B", 2, None][:2],
    "choices": ["a", "b"],
    "type": "multi_choice",
    "category": "c",
    "precision": 1,
    "id": "7",
}

TARGETS: dict[str, Target] = {
    **{f"image {name}": Target(_image, valid, (ImageError,)) for name, valid in IMAGES.items()},
    "image tiff pages": Target(_tiff_pages, lambda: [_pages(1), _pages(3)], (ImageError,)),
    **{
        f"{kind} jsonl": Target(
            _table(kind, ".jsonl"),
            partial(lambda rows: [_lines(*rows)], rows),
            (),
            _beside,
            "jsonl",
        )
        for kind, rows in ROWS.items()
    },
    "messages json": Target(
        _table("messages", ".json"),
        lambda: [json.dumps(ROWS["messages"]).encode()],
        (),
        _beside,
        "json",
    ),
    "sharegpt jsonl.gz": Target(
        _table("sharegpt", ".jsonl.gz"),
        lambda: [gzip.compress(_lines(*ROWS["sharegpt"] * 3), mtime=0)],
        (),
        _beside,
    ),
    "image_text parquet": Target(_table("image_text", ".parquet"), _parquet, (), _beside),
    "image_text arrow": Target(_table("image_text", ".arrow"), _arrow, (), _beside),
    "save_to_disk state": Target(
        partial(_source, CONFIGS["image_text"]("."), "state.json"),
        lambda: [json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}).encode()],
        (DataError,),
        _for_state,
        "json",
    ),
    "webdataset tar": Target(
        partial(_source, WebDatasetSource(type="webdataset", path="x.tar"), "x.tar"), _tars, ()
    ),
    "webdataset tar.gz": Target(
        partial(_source, WebDatasetSource(type="webdataset", path="x.tgz"), "x.tgz"),
        lambda: [gzip.compress(tar, mtime=0) for tar in _tars()],
        (),
    ),
    "llamafactory dataset_info": Target(
        partial(_source, LlamaFactorySource(type="llamafactory", path="."), "dataset_info.json"),
        lambda: [json.dumps(_ENTRY).encode()],
        (DataError,),
        _for_llamafactory,
        "json",
    ),
    "sroie box": Target(
        partial(_source, SroieSource(type="sroie", path=".", keep="all"), "box/1.csv"),
        lambda: [b"1,1,9,1,9,5,1,5,9.00\r\n0,0,12,0,12,9,0,9,25/12/2018\n"],
        (),
        _for_sroie,
        "text",
    ),
    "document": Target(_document, _documents, (), _for_pages),
    "experiment": Target(_experiment, lambda: [EXPERIMENT.encode()], (ConfigError,), kind="yaml"),
    "override": Target(
        _override, lambda: [text.encode() for text in OVERRIDES], (ConfigError,), kind="text"
    ),
    "ledger": Target(_ledger, _ledgers, (CheckpointError,), kind="jsonl"),
    "reference": Target(_reference, lambda: [json.dumps(_REFERENCE).encode()], (), kind="json"),
}
