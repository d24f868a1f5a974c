"""Every source against the contract of `raytune_vlm.sources.base`, then each format's own rules."""

import base64
import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import Source
from raytune_vlm.errors import DataError
from raytune_vlm.images import decode
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import SOURCES, rows
from raytune_vlm.sources.base import RowError, make_sample
from raytune_vlm.sources.sroie import crop_box

LIMITS = ImageLimits()
MODELS = {
    model.model_fields["type"].annotation.__args__[0]: model
    for model in get_args(get_args(Source)[0])
}
Result = Sample | Quarantined


def png(colour: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 10, 20)).save(buffer, format="PNG")
    return buffer.getvalue()


def read(
    kind: str, path: Path | str, root: Path, *, network: bool = False, **options: Any
) -> list[Result]:
    config = MODELS[kind](type=kind, path=str(path), **options)
    reader = SOURCES[kind]
    shards = reader.list_shards(config, root, network)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    return [
        item
        for shard in pickle.loads(pickle.dumps(shards))
        for item in reader.read_shard(config, shard, LIMITS)
    ]


def lines(file: Path, *values: Any) -> Path:
    text = [value if isinstance(value, str) else json.dumps(value) for value in values]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return file


def reasons(found: list[Result]) -> list[str]:
    return [item.reason if isinstance(item, Quarantined) else "" for item in found]


# --- the contract: each maker writes three rows, the middle one bad, and names the path


def row_of(kind: str, number: int) -> dict[str, Any]:
    image = f"image{number}.png"
    turns: dict[str, Any] = {
        "messages": {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": image}]},
                {"role": "assistant", "content": f"answer {number}"},
            ]
        },
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"answer {number}"},
            ],
            "images": [image],
        },
        "image_text": {"image": image, "text": f"answer {number}"},
        "cord": {"image": image, "ground_truth": json.dumps({"gt_parse": {"a": str(number)}})},
    }
    return turns[kind]


def make_table(kind: str, folder: Path) -> tuple[Path, str, str]:
    for number in range(3):
        (folder / f"image{number}.png").write_bytes(png(number))
    (folder / "image1.png").unlink()
    file = lines(folder / "train.jsonl", *(row_of(kind, number) for number in range(3)))
    return file, "train.jsonl:2", "image not found: image1.png"


def box(left: int, top: int, right: int, bottom: int, text: str) -> str:
    return f"{left},{top},{right},{top},{right},{bottom},{left},{bottom},{text}"


def make_sroie(folder: Path, *texts: str, name: str = "410") -> tuple[Path, str, str]:
    texts = texts or (
        box(10, 10, 50, 20, "9.00"),
        box(300, 10, 350, 20, "8.00"),
        box(10, 30, 50, 40, "25/12/2018"),
    )
    root = folder / "receipts"
    for part in ("img", "box", "key"):
        (root / part).mkdir(parents=True, exist_ok=True)
    scan = Image.new("RGB", (100, 60), "white")
    scan.paste((0, 0, 0), (20, 12, 40, 18))
    scan.save(root / "img" / f"{name}.jpg")
    (root / "box" / f"{name}.csv").write_bytes("\r\n".join(texts).encode())
    return root, "receipts/box/410.csv:2", "degenerate box"


def make(kind: str, folder: Path) -> tuple[Path, str, str]:
    return make_sroie(folder) if kind == "sroie" else make_table(kind, folder)


def test_the_table_has_every_type_of_the_config() -> None:
    assert set(SOURCES) == set(MODELS)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_bad_row_is_quarantined_and_its_neighbours_survive(kind: str, tmp_path: Path) -> None:
    path, origin, reason = make(kind, tmp_path)
    found = read(kind, path.name, tmp_path, split="select")
    assert [type(item) for item in found] == [Sample, Quarantined, Sample]
    bad = found[1]
    assert isinstance(bad, Quarantined)
    assert (bad.origin, bad.split) == (origin, "select")
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("kind", SOURCES)
def test_ids_are_stable_and_unique(kind: str, tmp_path: Path) -> None:
    path, _, _ = make(kind, tmp_path)
    first, again = (read(kind, path, Path())[::2] for _ in range(2))
    assert first == again
    ids = {item.sample_id for item in first if isinstance(item, Sample)}
    assert len(ids) == 2
    assert all(len(sample_id) == 16 for sample_id in ids)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_max_samples_counts_rows_in_order(kind: str, most: int, tmp_path: Path) -> None:
    path, _, _ = make(kind, tmp_path)
    assert read(kind, path, tmp_path, max_samples=most) == read(kind, path, tmp_path)[:most]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_missing_path_names_the_nearest(kind: str, tmp_path: Path) -> None:
    path, _, _ = make(kind, tmp_path)
    wrong = f"{path.stem}s{path.suffix}"
    with pytest.raises(
        DataError, match=rf"not found: {tmp_path}/{wrong}.*did you mean '{path.name}'"
    ):
        read(kind, wrong, tmp_path)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("path", ["s3://bucket/x.jsonl", "../outside", "link"])
def test_paths_that_may_not_be_read(kind: str, path: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError) as caught:
        read(kind, path, root)
    assert "\n" not in caught.value.message
    assert (
        "leaves" in caught.value.message
        or "data.allow_network" in caught.value.message
        or (kind == "sroie")
    )


# --- containers


def test_malformed_lines_are_named_and_passed(tmp_path: Path) -> None:
    good = row_of("image_text", 0)
    (tmp_path / "image0.png").write_bytes(png())
    file = lines(tmp_path / "x.jsonl", good, '{"a": 1,, }', "", "[1]", good)
    with file.open("ab") as stream:
        stream.write(b'{"text": "\xff"}\n' + b"[" * 100_000 + b"\n" + json.dumps(good).encode())
    found = read("image_text", file, tmp_path)
    assert [type(item) for item in found] == [
        Sample,
        *[Quarantined] * 2,
        Sample,
        *[Quarantined] * 2,
        Sample,
    ]
    assert isinstance(found[1], Quarantined)
    assert found[1].origin == "x.jsonl:2"
    assert found[1].reason.startswith("malformed JSON: ")
    assert found[1].reason.endswith("at column 9")
    assert reasons(found)[2] == "the row must be an object, not list"
    assert "not UTF-8" in reasons(found)[4]


def test_overlong_lines_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 200)
    good = {"image": "data:;base64," + base64.b64encode(png()).decode()[:8], "text": "x"}
    file = lines(tmp_path / "x.jsonl", good, '{"a": "' + "b" * 1000 + '"}', good)
    assert reasons(read("image_text", file, tmp_path)) == [
        "",
        "the line has more than 200 bytes",
        "",
    ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".ndjson", ".parquet"])
def test_the_same_rows_in_every_container(suffix: str, tmp_path: Path) -> None:
    values = [{"image": {"bytes": None, "path": f"{n}.png"}, "text": f"t{n}"} for n in range(3)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    file = tmp_path / f"x{suffix}"
    text = "\n".join(map(json.dumps, values)).encode()
    if suffix == ".json":
        file.write_text("\ufeff" + json.dumps(values), encoding="utf-8")
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), file)
    else:
        file.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    found = read("image_text", file, tmp_path)
    assert [item.answer for item in found if isinstance(item, Sample)] == ["t0", "t1", "t2"]
    assert [item.origin for item in found] == [f"x{suffix}:{n}" for n in (1, 2, 3)]


def parquet(file: Path, count: int, group: int = 100, **extra: list[Any]) -> Path:
    table = pa.table(
        {
            "image": [{"bytes": png(n % 250), "path": "x"} for n in range(count)],
            "text": [f"t{n}" for n in range(count)],
            **extra,
        }
    )
    pq.write_table(table, file, row_group_size=group, compression="none", use_dictionary=False)
    return file


def test_parquet_is_cut_at_row_groups_and_numbered_through(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", 1300)
    config = MODELS["image_text"](type="image_text", path="x.parquet", max_samples=1250)
    shards = SOURCES["image_text"].list_shards(config, tmp_path, False)
    assert [(shard.first_row, shard.limit) for shard in shards] == [
        (1, 600),
        (601, 600),
        (1201, 50),
    ]
    found = read("image_text", file, tmp_path)
    assert [item.origin for item in found] == [f"x.parquet:{n}" for n in range(1, 1301)]


def test_a_truncated_parquet_file_is_one_quarantined(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", 10)
    file.write_bytes(file.read_bytes()[:-20])
    parquet(tmp_path / "y.parquet", 2)
    found = read("image_text", ".", tmp_path)
    assert [type(item) for item in found] == [Quarantined, Sample, Sample]
    assert found[0].origin == "x.parquet"


def test_a_damaged_row_group_costs_only_itself(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", 300)
    meta = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    data[meta.data_page_offset : meta.data_page_offset + 40] = b"\xff" * 40
    file.write_bytes(bytes(data))
    found = read("image_text", file, tmp_path)
    assert sum(isinstance(item, Sample) for item in found) == 200
    assert next(r for r in reasons(found) if r).startswith("unreadable rows as far as 200")


def test_text_that_is_not_utf8_in_parquet_costs_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    images = [{"bytes": png(n), "path": None} for n in range(3)]
    pq.write_table(pa.table({"image": images, "text": text}), tmp_path / "x.parquet")
    found = read("image_text", "x.parquet", tmp_path)
    assert [type(item) for item in found] == [Sample, Quarantined, Sample]


@pytest.mark.parametrize("name", ["gone.jsonl", "x.jsonl.gz", "x.json", "y.json"])
def test_an_unreadable_shard_is_one_quarantined(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "x.json").write_text("[{,]")
    (tmp_path / "y.json").write_text('{"a": 1}\n{"a": 2}')
    (tmp_path / "gone.jsonl").write_text("{}")
    config = MODELS["image_text"](type="image_text", path=name)
    (shard,) = SOURCES["image_text"].list_shards(config, tmp_path, False)
    (tmp_path / "gone.jsonl").unlink()
    (found,) = SOURCES["image_text"].read_shard(config, shard, LIMITS)
    assert isinstance(found, Quarantined)
    assert found.origin == name


def test_a_torn_gzip_keeps_the_rows_before(tmp_path: Path) -> None:
    rows_of = [
        {"image": f"data:;base64,{base64.b64encode(png(n)).decode()}", "text": str(n)}
        for n in range(200)
    ]
    data = gzip.compress("\n".join(map(json.dumps, rows_of)).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(data[: len(data) // 2])
    found = read("image_text", "x.jsonl.gz", tmp_path)
    assert sum(isinstance(item, Quarantined) for item in found) == 1
    assert len(found) > 2
    assert reasons(found)[-1].startswith("unreadable file after row")


# --- paths


def test_folders_globs_and_their_errors(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        lines(tmp_path / name, {"image": "x", "text": "y"})
    (tmp_path / "notes.txt").write_text("x")
    assert [item.origin for item in read("image_text", ".", tmp_path)] == ["a.jsonl:1", "b.jsonl:1"]
    assert len(read("image_text", "**/*.jsonl", tmp_path)) == 3
    assert len(read("image_text", str(tmp_path / "*.jsonl"), Path())) == 2
    for path, message in [
        ("*.jsonx", "matches nothing"),
        ("nothere/*.jsonl", "no folder"),
        ("*.txt", "no file with a supported suffix"),
        ("notes.txt", "no supported suffix"),
    ]:
        with pytest.raises(DataError, match=message):
            read("image_text", path, tmp_path)
    with pytest.raises(DataError, match="leaves"):
        read("image_text", "../*.jsonl", tmp_path / "deep")
    with pytest.raises(DataError, match="not found"):
        read("image_text", "a.jsonl", tmp_path / "nothere")


def test_links_inside_a_folder_do_not_lead_out(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "x.jsonl").symlink_to(lines(outside / "x.jsonl", {"image": "x", "text": "y"}))
    for path, root in ((".", inside), (str(inside), Path()), (str(inside / "*"), Path())):
        with pytest.raises(DataError, match="leaves"):
            read("image_text", path, root)
    # A file that a person names by its absolute path may be a link.
    assert len(read("image_text", inside / "x.jsonl", Path())) == 1


def test_images_stay_in_the_folder_of_the_source_or_the_root(tmp_path: Path) -> None:
    root, data = tmp_path / "root", tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    data.mkdir()
    for file in (root / "pictures/a.png", data / "b.png", tmp_path / "secret.png"):
        file.write_bytes(png())
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["pictures/a.png", "b.png", str(data / "b.png"), "../secret.png"]
    names += [
        str(tmp_path / "secret.png"),
        "link.png",
        "http://host/x.png",
        ".",
        "a\0b",
        "x" * 5000,
    ]
    file = lines(data / "x.jsonl", *({"image": name, "text": "t"} for name in names))
    found = reasons(read("image_text", file, root))
    assert found[:3] == ["", "", ""]
    assert all(reason.startswith("image is outside") for reason in found[3:6])
    assert found[6].startswith("image is a URL")
    assert all(found[7:])


def test_remote_sources_need_permission_and_keep_their_folder() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/set/a.png", png())
    system.pipe("/secret.png", png())
    names = ("a.png", "../secret.png", "gone.png")
    text = "\n".join(json.dumps({"image": name, "text": "t"}) for name in names)
    system.pipe("/set/x.jsonl", text.encode())
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [png(3)], "text": ["p"]}), table)
    system.pipe("/set/y.parquet", table.getvalue())
    try:
        with pytest.raises(DataError, match=r"data\.allow_network"):
            read("image_text", "memory://set/x.jsonl", Path())
        with pytest.raises(DataError, match="nothing found"):
            read("image_text", "memory://set/*.json", Path(), network=True)
        with pytest.raises(DataError, match="unknown scheme"):
            read("image_text", "file:///etc/x.jsonl", Path(), network=True)
        for path in ("memory://set", "memory://set/*"):
            found = reasons(read("image_text", path, Path(), network=True))
            assert found[0] == found[3] == ""
            assert "outside" in found[1]
            assert "not found" in found[2]
    finally:
        system.rm("/set", recursive=True)
        system.rm("/secret.png")


# --- samples


def turn(role: str, *parts: str) -> dict[str, Any]:
    return {
        "role": role,
        "content": [
            {"type": "image"} if part == "<image>" else {"type": "text", "text": part}
            for part in parts
        ],
    }


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([], 0, "conversation is empty"),
        ([turn("user", "a")], 0, "last turn is 'user'"),
        ([turn("system", "a")], 0, "last turn is 'system'"),
        ([turn("assistant", "a")], 0, "turn 1 is 'assistant' where 'user'"),
        ([turn("user", "a"), turn("user", "b")], 0, "turn 2 is 'user' where 'assistant'"),
        ([turn("system", "s"), turn("system", "s")], 0, "turn 2 is 'system' where 'user'"),
        ([turn("user", "a"), turn("assistant", " \n")], 0, r"turn 2 \(assistant\) is empty"),
        ([turn("user"), turn("assistant", "b")], 0, r"turn 1 \(user\) is empty"),
        ([turn("user", "a"), turn("assistant", "<image>")], 1, "only user turns"),
        (
            [turn("user", "<image>", "<image>"), turn("assistant", "b")],
            1,
            "2 <image> placeholders but 1 image$",
        ),
        ([turn("user", "a"), turn("assistant", "b")], 1, "0 <image> placeholders but 1 image$"),
        ([turn("user", "\ud800"), turn("assistant", "b")], 0, "surrogate"),
        ([turn("user", 5), turn("assistant", "b")], 0, "text must be a string, not int"),  # type: ignore[arg-type]
    ],
)
def test_conversations_that_are_refused(
    messages: list[dict[str, Any]], images: int, message: str
) -> None:
    with pytest.raises(RowError, match=message):
        make_sample(origin="x:1", messages=messages, images=[b"x"] * images)


def test_groups_follow_the_images() -> None:
    def sample(answer: str, *images: bytes, group: str | None = None) -> Sample:
        asked = turn("user", *["<image>"] * len(images), "q")
        return make_sample(
            origin="x:1", messages=[asked, turn("assistant", answer)], images=images, group_id=group
        )

    assert sample("a", b"1").group_id == sample("b", b"1").group_id != sample("a", b"2").group_id
    assert sample("a", b"1").sample_id != sample("b", b"1").sample_id
    assert sample("a", b"1", b"23").sample_id != sample("a", b"12", b"3").sample_id
    assert sample("a").group_id == sample("a").sample_id
    assert sample("a", b"1", group="doc").group_id == "doc"


def test_the_group_column(tmp_path: Path) -> None:
    extra: dict[str, list[Any]] = {"group_id": [7, 7, None]}
    file = parquet(tmp_path / "x.parquet", 3, **extra)
    groups = [
        item.group_id for item in read("image_text", file, tmp_path) if isinstance(item, Sample)
    ]
    assert groups[:2] == ["7", "7"]
    assert len(groups[2]) == 16
    lines(tmp_path / "y.jsonl", {"image": "data:;base64,AAAA", "text": "t", "group_id": [1]})
    assert "group_id" in reasons(read("image_text", "y.jsonl", tmp_path))[0]


# --- formats


def answer(text: str = "b") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


URI = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user({"type": "image_url", "image_url": {"url": URI}}), answer()]}, ""),
        ({"messages": [user({"type": "image_url", "image_url": URI}), answer()]}, ""),
        ({"messages": [user({"type": "image"}), answer()], "images": [URI]}, ""),
        ({"messages": [{"role": "user", "content": "a<image>b"}, answer()], "images": URI}, ""),
        ({"messages": [user({"type": "text", "text": "q"}), answer()]}, ""),
        ({"message": []}, "no column 'messages' (did you mean 'message'?)"),
        ({"messages": None}, "column 'messages' is null"),
        ({"messages": "hi"}, "column 'messages' must be a list, not str"),
        (
            {"messages": [user({"type": "image"}), answer()], "image": [URI]},
            "1 <image> placeholder but 0 images (no column 'images' (did you mean 'image'?))",
        ),
        (
            {"messages": [user({"type": "image", "image": URI}), answer()], "images": [URI]},
            "0 <image> placeholders but 1 image",
        ),
        (
            {"messages": [user({"type": "image", "index": 1}), answer()], "images": [URI]},
            "turn 1: image index 1 where 0 is expected",
        ),
        (
            {"messages": [user({"type": "video", "video": "x"}), answer()]},
            "turn 1: part type 'video' is not supported",
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": "https://x/y.png"}), answer()]},
            "image is a URL, which rows may not name: https://x/y.png",
        ),
        (
            {
                "messages": [
                    user({"type": "image_url", "image_url": "data:image/png;base64,@@"}),
                    answer(),
                ]
            },
            "image is malformed base64",
        ),
        ({"messages": [user({"type": "image", "image": 5}), answer()]}, "image must be a path"),
        (
            {"messages": [user({"type": "text", "text": None}), answer()]},
            "turn 1 (user): text must",
        ),
        (
            {"messages": [{"role": "user", "content": None}, answer()]},
            "turn 1 (user): content is NoneType",
        ),
        ({"messages": [{"content": "a"}, answer()]}, "turn 1 has no 'role'"),
        ({"messages": ["a"]}, "turn 1 must be an object"),
        ({"messages": [user("a"), {**answer(), "tool_calls": [{}]}]}, "turn 2 has tool calls"),
    ],
)
def test_messages(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (found,) = reasons(read("messages", lines(tmp_path / "x.jsonl", row), tmp_path))
    assert found.startswith(reason)
    assert bool(found) is bool(reason)


def test_messages_from_parquet_with_null_filled_parts(tmp_path: Path) -> None:
    asked = [{"type": "text", "text": "q"}, {"type": "image", "text": None}]
    values = [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ],
            "images": [{"bytes": png(n), "path": None}],
        }
        for n in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "x.parquet")
    found = read("messages", "x.parquet", tmp_path)
    assert [item.images for item in found if isinstance(item, Sample)] == [[png(0)], [png(1)]]
    assert isinstance(found[0], Sample)
    assert found[0].messages[0]["content"] == [{"type": "text", "text": "q"}, {"type": "image"}]


def sharegpt(*turns: tuple[str, Any], images: int = 0, **extra: Any) -> dict[str, Any]:
    talk = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"conversations": talk, "images": [URI] * images, **extra}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (sharegpt(("human", "a<image>b<image>"), ("gpt", "c"), images=2), ""),
        (sharegpt(("user", "a"), ("assistant", "c")), ""),
        (
            sharegpt(("human", "<image><image>"), ("gpt", "c"), images=1),
            "2 <image> placeholders but 1 image",
        ),
        (sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")), "turn 2 is 'user' where"),
        (
            sharegpt(("humans", "a"), ("gpt", "c")),
            "turn 1 is from 'humans' (did you mean 'human'?)",
        ),
        (sharegpt(("human", "a"), ("function_call", "{}"), ("gpt", "c")), "turn 2 is a tool turn"),
        (sharegpt(("human", "a"), ("gpt", None)), "turn 2 (gpt): value must be a string"),
        ({"conversation": []}, "no column 'conversations' (did you mean 'conversation'?)"),
    ],
)
def test_sharegpt(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (found,) = reasons(read("sharegpt", lines(tmp_path / "x.jsonl", row), tmp_path))
    assert found.startswith(reason)
    assert bool(found) is bool(reason)


def test_sharegpt_expands_in_place_and_takes_the_system_column(tmp_path: Path) -> None:
    row = sharegpt(("human", "a<image>b<image>"), ("gpt", "c"), images=2, system="be brief")
    (found,) = read("sharegpt", lines(tmp_path / "x.jsonl", row), tmp_path)
    assert isinstance(found, Sample)
    assert found.messages == [
        turn("system", "be brief"),
        turn("user", "a", "<image>", "b", "<image>"),
        turn("assistant", "c"),
    ]


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ({"gt_parse": {"b": {"c": "1"}, "a": "2"}}, "<s_b><s_c>1</s_c></s_b><s_a>2</s_a>"),
        ({"gt_parses": [{"a": "first"}, {"a": "second"}]}, "<s_a>first</s_a>"),
        ({"gt_pars": {}}, "ground_truth has no gt_parse or gt_parses (did you mean 'gt_pars'?)"),
        ({"gt_parse": {}}, "ground_truth: the parse must be a non-empty object"),
        ('{"gt_parse": }', "ground_truth: malformed JSON: Expecting value at line 1 column 14"),
        ("[1]", "ground_truth must be an object, not list"),
    ],
)
def test_cord(truth: Any, expected: str, tmp_path: Path) -> None:
    text = truth if isinstance(truth, str) else json.dumps(truth)
    file = lines(tmp_path / "x.jsonl", {"image": URI, "ground_truth": text})
    (found,) = read("cord", file, tmp_path)
    got = found.answer if isinstance(found, Sample) else found.reason
    assert got.startswith(expected)


def test_missing_and_null_columns(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "x.jsonl",
        {"img": URI, "text": "t"},
        {"image": None, "text": "t"},
        {"image": URI, "text": 5},
        {"image": URI, "caption": "t"},
    )
    found = reasons(read("image_text", file, tmp_path))
    assert found[0].startswith("no column 'image'")
    assert found[1:3] == ["column 'image' is null", "column 'text' must be a string, not int"]
    assert found[3].startswith("no column 'text'")
    parquet(tmp_path / "x.parquet", 1)
    (bad,) = reasons(read("image_text", "x.parquet", tmp_path, text_column="txt"))
    assert bad == "no column 'txt' (did you mean 'text'?)"


# --- SROIE


def test_sroie_keeps_amounts_and_dates(tmp_path: Path) -> None:
    kept = [
        "9.00",
        "-0.03",
        "RM1,234.50",
        "$9.90 SR",
        ".50",
        "25/12/2018 8:13:39 PM",
        "05 MAR 2018",
        "2018-03-05",
        "12-03-18",
    ]
    left = ["9", "TOTAL: 9.00", "18:24:10", "789417-W", "1.234", "6%", "12-03/18", "CASH"]
    root, _, _ = make_sroie(tmp_path, *(box(10, 10, 50, 20, text) for text in kept + left))
    found = read("sroie", root, tmp_path)
    assert [item.answer for item in found if isinstance(item, Sample)] == kept
    assert {item.group_id for item in found if isinstance(item, Sample)} == {"410"}
    assert len(read("sroie", root, tmp_path, max_characters=5)) == 3
    everything = read("sroie", root, tmp_path, keep="all")
    assert len(everything) == len(kept + left)


def test_sroie_crops_with_a_margin_and_clips(tmp_path: Path) -> None:
    root, _, _ = make_sroie(tmp_path, box(10, 10, 50, 20, "9.00"), box(-5, 50, 20, 90, "8.00"))
    first, second = read("sroie", root, tmp_path, margin=0.5)
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    crop = decode(first.images[0], LIMITS)
    assert crop.size == (50, 20)
    assert crop.getpixel((25, 10))[0] < 60
    assert decode(second.images[0], LIMITS).size == (25, 15)


def test_sroie_flaws_are_quarantined_line_by_line(tmp_path: Path) -> None:
    root, _, _ = make_sroie(
        tmp_path, box(10, 10, 10, 20, "9.00"), "1,2,3,oops", box(10, 10, 50, 20, "7.00")
    )
    file = root / "box" / "410.csv"
    line = box(10, 10, 50, 20, "").encode()
    file.write_bytes(
        b"\xef\xbb\xbf" + file.read_bytes() + b"\r\n\r\n" + line + b"\xa35.00\n" + line + b"caf\xe9"
    )
    make_sroie(tmp_path, name="411")
    (root / "img" / "411.jpg").write_bytes(b"broken")
    make_sroie(tmp_path, name="412")
    (root / "img" / "412.jpg").unlink()
    make_sroie(tmp_path, name="413")
    (root / "box" / "413.csv").unlink()
    found = read("sroie", root, tmp_path)
    by_origin = {item.origin: item for item in found}
    assert len(by_origin) == len(found)
    expected: dict[str, Callable[[str], bool]] = {
        "box/410.csv:1": lambda text: text.startswith("degenerate box"),
        "box/410.csv:2": lambda text: text.startswith("malformed box line"),
        "box/410.csv:5": lambda text: text == "the transcript is not UTF-8",
        "box/411.csv:1": lambda text: text.startswith("not an image"),
        "box/412.csv:3": lambda text: text.startswith("image not found"),
        "img/413.jpg": lambda text: text == "the scan has no box file",
    }
    for origin, says in expected.items():
        item = by_origin[f"receipts/{origin}"]
        assert isinstance(item, Quarantined)
        assert says(item.reason), item.reason
    assert isinstance(by_origin["receipts/box/410.csv:3"], Sample)
    assert len(found) == 4 + 3 + 3 + 1


def test_sroie_folder_errors(tmp_path: Path) -> None:
    root, _, _ = make_sroie(tmp_path)
    (root / "box").rename(root / "boxes")
    with pytest.raises(DataError, match=r"no folder 'box' in .*did you mean 'boxes'"):
        read("sroie", root, tmp_path)
    for number in range(20):
        make_sroie(tmp_path / "many", name=f"{number:03d}")
    config = MODELS["sroie"](type="sroie", path="many/receipts")
    shards = SOURCES["sroie"].list_shards(config, tmp_path, False)
    assert [len(shard.members) for shard in shards] == [8, 8, 4]


def test_degenerate_boxes() -> None:
    assert crop_box((2, 2, 8, 6), (10, 10), 0.0) == (2, 2, 8, 6)
    for bad in ((5, 5, 5, 9), (20, 0, 30, 5), (-9, 0, 1, 5), (3, 9, 8, 30)):
        with pytest.raises(RowError, match="degenerate"):
            crop_box(bad, (10, 10), 1.0)
