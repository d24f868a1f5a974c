"""Every source against the contract of `raytune_vlm.sources.base`; each format's own rules are
tested in the `test_sources_*.py` beside this file, with the functions of this one.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.sources import Source
from raytune_vlm.errors import DataError
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import SOURCES, Shard
from raytune_vlm.sources.files import noted_images

LIMITS = ImageLimits()
MODELS = {
    model.model_fields["type"].annotation.__args__[0]: model
    for model in get_args(get_args(Source)[0])
}
OPTIONS: dict[str, dict[str, Any]] = {
    "python": {"function": f"{__name__}:rows_of_lines"},
    "table": {"function": f"{__name__}:asked_of_row", "columns": ("image", "text")},
}
"""What a type cannot do without, beside its path."""
Result = Sample | Quarantined


def png(colour: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 10, 20)).save(buffer, format="PNG")
    return buffer.getvalue()


def config_of(kind: str, path: Path | str, **options: Any) -> Any:
    return MODELS[kind](type=kind, path=str(path), **{**OPTIONS.get(kind, {}), **options})


def shards_of(kind: str, path: Path | str, root: Path, **options: Any) -> list[Shard]:
    return SOURCES[kind].list_shards(config_of(kind, path, **options), root, False)


def read(
    kind: str, path: Path | str, root: Path, *, network: bool = False, **options: Any
) -> list[Result]:
    config = config_of(kind, path, **options)
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


def rows_of_lines(options: dict[str, Any], path: str) -> Iterator[Any]:
    """The function of the `python` source: JSON lines, as a user would read them."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def asked_of_row(row: dict[str, Any], options: dict[str, Any]) -> dict[str, Any] | None:
    """The function of the `table` source."""
    if row["text"] in options.get("without", ()):
        return None
    return {
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": row["text"]},
        ],
        "images": [row["image"]],
    }


# --- the contract: each maker writes three rows, the middle one bad, and names the path


def asked(number: int) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": f"answer {number}"},
    ]


ROWS: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "messages": lambda number, image: {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": image}]},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    },
    "sharegpt": lambda number, image: {"conversations": asked(number), "images": [image]},
    "prompt_completion": lambda number, image: {
        "prompt": "What?",
        "completion": f"answer {number}",
        "images": [image],
    },
    "image_text": lambda number, image: {"image": image, "text": f"answer {number}"},
    "cord": lambda number, image: {
        "image": image,
        "ground_truth": json.dumps({"gt_parse": {"a": str(number)}}),
    },
}


def row_of(kind: str, number: int) -> dict[str, Any]:
    return ROWS[kind](number, f"image{number}.png")


def make_table(kind: str, folder: Path, name: str = "train.jsonl") -> tuple[Path, str, str]:
    for number in (0, 2):
        (folder / f"image{number}.png").write_bytes(png(number))
    file = lines(folder / name, *(row_of(kind, number) for number in range(3)))
    return file, f"{name}:2", "image not found: image1.png"


def make_llamafactory(folder: Path) -> tuple[Path, str, str]:
    _, origin, reason = make_table("sharegpt", folder)
    columns = {"messages": "conversations", "images": "images"}
    entry = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": columns}
    file = folder / "dataset_info.json"
    file.write_text(json.dumps({"mine": entry}))
    return file, origin, reason


def make_tar(file: Path, *members: tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def make_webdataset(folder: Path) -> tuple[Path, str, str]:
    members = []
    for number in range(3):
        members.append((f"{number}.txt", f"answer {number}".encode()))
        if number != 1:
            members.append((f"{number}.png", png(number)))
    return make_tar(folder / "train.tar", *members), "train.tar:1", "the sample has no image"


def make_pdf(folder: Path) -> tuple[Path, str, str]:
    for number in (0, 2):
        page = Image.new("RGB", (6, 4), (number, 10, 20))
        page.save(folder / f"doc{number}.pdf", resolution=72)
    rows = [{"file": f"doc{n}.pdf", "page": 1, "text": f"answer {n}"} for n in range(3)]
    file = lines(folder / "train.jsonl", *rows)
    return file, "train.jsonl:2", "document not found: doc1.pdf"


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


MAKERS: dict[str, Callable[[Path], tuple[Path, str, str]]] = {
    **{kind: lambda folder, kind=kind: make_table(kind, folder) for kind in ROWS},  # type: ignore[misc]
    "sroie": lambda folder: make_sroie(folder),
    "webdataset": make_webdataset,
    "llamafactory": make_llamafactory,
    "python": lambda folder: make_table("messages", folder, "mine.txt"),
    "table": lambda folder: make_table("image_text", folder),
    "pdf": make_pdf,
}
"""Type -> what writes three rows, the middle one bad: path, origin and reason of that."""


def make(kind: str, folder: Path) -> tuple[Path, str, str]:
    return MAKERS[kind](folder)


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


@pytest.mark.parametrize("kind", SOURCES)
def test_listing_again_gives_the_same_shards(kind: str, tmp_path: Path) -> None:
    path, _, _ = make(kind, tmp_path)
    assert shards_of(kind, path, tmp_path) == shards_of(kind, path, tmp_path)


@pytest.mark.parametrize("kind", SOURCES)
def test_an_image_beyond_the_limit_is_refused(kind: str, tmp_path: Path) -> None:
    path, _, _ = make(kind, tmp_path)
    reader, limits = SOURCES[kind], ImageLimits(max_bytes=20)
    found = [
        item
        for shard in shards_of(kind, path, tmp_path)
        for item in reader.read_shard(config_of(kind, path), shard, limits)
    ]
    assert len(found) == 3
    assert all(isinstance(item, Quarantined) for item in found)
    assert " 20" in reasons(found)[0]
    assert "bytes" in reasons(found)[0]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_image_files_that_were_read_are_noted(kind: str, tmp_path: Path) -> None:
    path, _, _ = make(kind, tmp_path)
    with noted_images() as noted:
        read(kind, path, tmp_path)
    images = [f"image{number}.png" for number in range(3)]
    pages = [f"doc{number}.pdf" for number in range(3)]
    images = {"sroie": ["410.jpg"], "webdataset": [], "pdf": pages}.get(kind, images)
    assert sorted(Path(name).name for name in noted) == images
    for name, noted_state in noted.items():
        if Path(name).name in ("image1.png", "doc1.pdf"):
            assert noted_state == ()
        else:
            state = Path(name).stat()
            assert noted_state == (state.st_size, state.st_mtime_ns)


def test_a_table_s_function_leaves_rows_out_and_names_what_it_lacks(tmp_path):
    rows = [{"image": "image0.png", "text": text} for text in ("a", "b", "a")]
    (tmp_path / "image0.png").write_bytes(png())
    file = lines(tmp_path / "rows.jsonl", *rows, {"image": "image0.png", "txt": "c"})
    found = read("table", file, tmp_path, options={"without": ["b"]})
    assert reasons(found) == ["", "", "no column 'text' (did you mean 'txt'?)"]
    first, second = found[:2]
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert first.sample_id != second.sample_id, "two rows are two samples"
    assert first.group_id == second.group_id
