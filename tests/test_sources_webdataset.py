"""WebDataset shards: what a sample may hold, and what a damaged tar still gives."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from test_sources import LIMITS, config_of, make_tar, png, read, reasons, shards_of

from raytune_vlm.errors import DataError
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import SOURCES, webdataset

TALK = [{"role": "user", "content": "<image>a<image>"}, {"role": "assistant", "content": "b"}]

BOTH = {"role": "user", "content": [{"type": "image", "image": f"{n}.png"} for n in "kl"]}


def row(value: Any) -> bytes:
    return json.dumps(value).encode()


def pair(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(number)), (f"{key}.txt", f"t{number}\n".encode())]


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_pairs_from_each_kind_of_tar(suffix: str, mode: str, tmp_path: Path) -> None:
    members = [member for n in range(3) for member in pair(f"a/{n:03d}", n)]
    make_tar(tmp_path / f"x{suffix}", *members, mode=mode)
    found = read("webdataset", ".", tmp_path, instruction="What?")
    assert [item.origin for item in found] == [f"x{suffix}:a/{n:03d}" for n in range(3)]
    first = found[0]
    assert isinstance(first, Sample)
    assert (first.answer, first.images) == ("t0", [png(0)])
    assert first.messages[0]["content"][1] == {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "value",
    [
        {"messages": TALK},
        {"messages": TALK, "images": ["k.2.png", "k.10.png"]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "k.2.png"},
                        {"type": "text", "text": "a"},
                        {"type": "image", "image": "10.png"},
                    ],
                },
                TALK[1],
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "<image>a<image>"},
                {"from": "gpt", "value": "b"},
            ]
        },
    ],
)
def test_rows_in_json_show_the_images_of_the_sample(value: Any, tmp_path: Path) -> None:
    value["group_id"] = "g"
    members = [("k.10.png", png(10)), ("k.2.png", png(2)), ("k.json", row(value))]
    (sample,) = read("webdataset", make_tar(tmp_path / "x.tar", *members), tmp_path)
    assert isinstance(sample, Sample), sample
    kinds = [part["type"] for part in sample.messages[0]["content"]]
    assert kinds == ["image", "text", "image"]
    assert sample.images == [png(2), png(10)]
    assert (sample.answer, sample.group_id) == ("b", "g")


def test_captions_in_json_and_several_images(tmp_path: Path) -> None:
    members = [
        ("a.img0.jpg", png(1)),
        ("a.img1.jpg", png(2)),
        ("a.json", row({"caption": "c"})),
        ("b.webp", png(3)),
        ("b.json", row({"text": "d", "caption": "e", "width": 3})),
    ]
    found = read("webdataset", make_tar(tmp_path / "x.tar", *members), tmp_path)
    samples = [item for item in found if isinstance(item, Sample)]
    assert [sample.answer for sample in samples] == ["c", "d"]
    assert samples[0].images == [png(1), png(2)]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.png", png())], "the sample has no .txt or .json member"),
        ([("k.txt", b"t")], "the sample has no image member"),
        ([("k.json", row({"text": "t"}))], "the sample has no image member"),
        ([*pair("k"), ("k.json", b"{}")], "the sample has .txt and .json members: say which"),
        ([*pair("k"), ("k.cls", b"1")], "unexpected member 'k.cls': if it is not needed"),
        ([*pair("k"), ("k", b"1")], "unexpected member 'k'"),
        ([*pair("k"), ("k.txt", b"u")], "two members 'k.txt'"),
        ([("k.png", png()), ("k.txt", b"\xff")], "the .txt member is not UTF-8 at byte 1"),
        ([("k.png", png()), ("k.txt", b" \n")], "turn 2 (assistant) is empty"),
        ([("k.png", png()), ("k.json", b"{,}")], "malformed JSON: Expecting property name"),
        ([("k.png", png()), ("k.json", b"[" * 99999)], "malformed JSON: "),
        ([("k.png", png()), ("k.json", b"[1]")], "the .json member must hold an object, not list"),
        ([("k.png", png()), ("k.json", b"{}")], "the .json member has none of messages, conv"),
        (
            [("k.png", png()), ("k.json", row({"messages": [BOTH, TALK[1]]}))],
            "2 <image> placeholders but 1 image",
        ),
        ([("k.png", png()), ("k.json", row({"text": 5}))], "column 'text' must be a string"),
        (
            [("k.png", png()), ("k.json", row({"messages": TALK}))],
            "2 <image> placeholders but 1 image",
        ),
        (
            [("k.png", png()), ("k.json", row({"messages": TALK, "images": ["k.png", "b.png"]}))],
            "the sample has no image member 'b.png'",
        ),
        (
            [("k.json", row({"messages": TALK, "images": ["/etc/hosts", "../k.png"]}))],
            "the sample has no image member '/etc/hosts'",
        ),
    ],
)
def test_a_bad_member_costs_one_sample(
    members: list[tuple[str, bytes]], reason: str, tmp_path: Path
) -> None:
    file = make_tar(tmp_path / "x.tar", *pair("a"), *members, *pair("z"))
    found = read("webdataset", file, tmp_path)
    assert [item.origin for item in found] == ["x.tar:a", "x.tar:k", "x.tar:z"]
    assert [bool(text) for text in reasons(found)] == [False, True, False]
    assert reasons(found)[1].startswith(reason)


def test_links_and_hidden_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in [
            ("dir", tarfile.DIRTYPE),
            (".hidden", tarfile.REGTYPE),
            ("k.png", tarfile.SYMTYPE),
            ("l.png", tarfile.LNKTYPE),
            ("m.png", tarfile.FIFOTYPE),
            ("../../n.png", tarfile.REGTYPE),
        ]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/hosts"
            archive.addfile(entry, io.BytesIO())
    found = read("webdataset", "x.tar", tmp_path)
    assert [item.origin for item in found] == [f"x.tar:{key}" for key in ("k", "l", "m", "../../n")]
    assert ["is a link or a device" in text for text in reasons(found)] == [True] * 3 + [False]
    assert reasons(found)[3] == "the sample has no .txt or .json member"
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_options_say_what_else_a_sample_holds(tmp_path: Path) -> None:
    members = [*pair("k", 1), ("k.json", row({"text": "j"})), ("k.cls", b"1"), ("k.meta.json", b"")]
    file = make_tar(tmp_path / "x.tar", *members)
    for target, expected in (("txt", "t1"), ("json", "j")):
        (sample,) = read(
            "webdataset", file, tmp_path, target=target, ignored_suffixes=("cls", "meta.json")
        )
        assert isinstance(sample, Sample)
        assert sample.answer == expected
    make_tar(file, *pair("k"))
    (bad,) = reasons(read("webdataset", file, tmp_path, target="json"))
    assert bad == "the sample has no .json member"


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_tar_gives_the_samples_before(zipped: bool, tmp_path: Path) -> None:
    members = [member for n in range(6) for member in pair(f"{n}", n)]
    whole = make_tar(tmp_path / "x.tar", *members).read_bytes()
    places = []  # where each sample's members end
    with tarfile.open(tmp_path / "x.tar") as archive:
        for entry in archive:
            places.append(entry.offset_data + -(-entry.size // 512) * 512)
    complete = read("webdataset", "x.tar", tmp_path)
    for cut in range(0, places[-1], 301):
        file = tmp_path / ("y.tar.gz" if zipped else "y.tar")
        file.write_bytes(gzip.compress(whole[:cut]) if zipped else whole[:cut])
        found = read("webdataset", file.name, tmp_path)
        assert isinstance(found[-1], Quarantined)
        assert found[-1].origin == file.name
        assert found[-1].reason.startswith("unreadable tar")
        # The next sample's first header tells that a sample is whole.
        expected = sum(place + 512 <= cut for place in places[1::2])
        assert len(found) == expected + 1
        for mine, other in zip(found[:-1], complete, strict=False):
            assert isinstance(mine, Sample)
            assert isinstance(other, Sample)
            assert mine.sample_id == other.sample_id
        limited = read("webdataset", file.name, tmp_path, max_samples=2)
        assert limited == found[:2]


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    file = make_tar(tmp_path / "x.tar", *pair("a"), *pair("b"), *pair("c"))
    data = bytearray(file.read_bytes())
    data[512 * 6 : 512 * 6 + 20] = b"\xff" * 20  # a.png, a.txt, b.png have two blocks each
    file.write_bytes(bytes(data))
    found = read("webdataset", file, tmp_path)
    assert [type(item) for item in found] == [Sample, Quarantined]
    assert reasons(found)[1].startswith("unreadable tar after member 'b.png': damaged header")


def test_torn_gzip_data_and_what_is_no_tar(tmp_path: Path) -> None:
    members = [member for n in range(50) for member in pair(f"{n}", n)]
    file = make_tar(tmp_path / "x.tar.gz", *members, mode="w:gz")
    data = bytearray(file.read_bytes())
    file.write_bytes(data[: len(data) // 2])
    found = read("webdataset", file, tmp_path)
    assert sum(isinstance(item, Quarantined) for item in found) == 1
    assert len(found) > 5
    data[-6] ^= 1  # the checksum
    file.write_bytes(bytes(data))
    assert reasons(read("webdataset", file, tmp_path))[-1].startswith("unreadable tar after member")
    for content in (b"", b"no tar" * 999):
        (tmp_path / "y.tar").write_bytes(content)
        (bad,) = reasons(read("webdataset", "y.tar", tmp_path))
        assert bad.startswith("unreadable tar: ")


def test_members_beyond_the_limits_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_tar(
        tmp_path / "x.tar", *pair("a"), ("k.png", png()), ("k.txt", b"t" * 300), *pair("z")
    )
    monkeypatch.setattr(webdataset, "MAX_TARGET_BYTES", 200)
    assert reasons(read("webdataset", file, tmp_path)) == [
        "",
        "member 'k.txt' has 300 bytes, the limit is 200",
        "",
    ]
    monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 10)
    assert reasons(read("webdataset", file, tmp_path))[0] == "the sample has more than 10 bytes"


def test_one_shard_a_tar_and_max_samples_over_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_tar(tmp_path / f"{name}.tar", *pair("0"), *pair("1"), *pair("2"))
    assert len(shards_of("webdataset", ".", tmp_path)) == 2
    shards = shards_of("webdataset", "*.tar", tmp_path, max_samples=4)
    assert [shard.limit for shard in shards] == [3, 1]
    config = config_of("webdataset", "*.tar")
    found = [item for s in shards for item in SOURCES["webdataset"].read_shard(config, s, LIMITS)]
    assert [item.origin for item in found] == ["a.tar:0", "a.tar:1", "a.tar:2", "b.tar:0"]
    with pytest.raises(DataError, match=r"no supported suffix \(known: \.tar, \.tar\.gz, \.tgz\)"):
        (tmp_path / "x.zip").write_bytes(b"")
        read("webdataset", "x.zip", tmp_path)
