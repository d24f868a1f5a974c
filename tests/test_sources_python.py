"""A format of one's own: what the function may yield, and how its failures are told."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_sources import config_of, lines, png, read, reasons, row_of, shards_of

from raytune_vlm.errors import DataError
from raytune_vlm.records import Sample


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of imports, whose modules are forgotten afterwards."""
    import sys

    before = set(sys.modules)
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def rows(options: dict[str, Any], path: str) -> Iterator[Any]:
    name = options.get("image", "a.png")
    for number in range(options["count"]):
        if number == options.get("raises"):
            raise KeyError("no such thing")
        asked = {"role": "user", "content": "<image>?"}
        answered = {"role": "assistant", "content": f"{Path(path).name} {number}"}
        row: Any = {"messages": [asked, answered], "images": [name], "group_id": "g"}
        yield "no dict" if number == options.get("bad") else row


FUNCTION = {"function": f"{__name__}:rows"}


def test_a_function_gives_rows_in_the_layout_of_messages(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    (tmp_path / "data" / "x.bin").write_bytes(b"")
    for path, name in (("data/x.bin", "x.bin"), ("data", "data")):
        found = read("python", path, tmp_path, options={"count": 2}, **FUNCTION)
        assert [item.answer for item in found if isinstance(item, Sample)] == [
            f"{name} 0",
            f"{name} 1",
        ]
        assert [item.origin for item in found] == [f"{path}:1", f"{path}:2"]
        assert all(item.group_id == "g" for item in found if isinstance(item, Sample))
    assert len(shards_of("python", "data/*", tmp_path, **FUNCTION)) == 2
    limited = read("python", "data/*", tmp_path, max_samples=3, options={"count": 2}, **FUNCTION)
    assert [item.origin for item in limited] == [
        "data/a.png:1",
        "data/a.png:2",
        "data/x.bin:1",
    ]


def test_a_bad_row_costs_itself_and_an_exception_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    options = {"count": 9, "bad": 1, "raises": 3}
    found = read("python", "a.png", tmp_path, options=options, **FUNCTION)
    assert reasons(found) == [
        "",
        "the row must be an object, not str",
        "",
        f"{__name__}:rows raises KeyError: 'no such thing'",
    ]
    assert found[3].origin == "a.png:4"
    (bad,) = reasons(read("python", "a.png", tmp_path, **FUNCTION))
    assert bad == f"{__name__}:rows raises KeyError: 'count'"
    outside = {"count": 1, "image": "/etc/hosts"}
    (bad,) = reasons(read("python", "a.png", tmp_path, options=outside, **FUNCTION))
    assert bad.startswith("image is outside the source's folder and data.root")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_dta:rows", r"no module 'my_dta' \(did you mean 'my_data'\?\); it must be installed"),
        ("my_package.moduel:rows", r"no module 'my_package.moduel' \(did you mean 'module'\?\)"),
        ("my_data.deep:rows", "no module 'my_data.deep'"),
        ("my_data:row", r"no 'row' in my_data \(did you mean 'rows'\?\)"),
        ("my_data:NUMBER", "'NUMBER' is no function in my_data"),
        ("my_broken:rows", "importing it raises ZeroDivisionError: division by zero"),
        ("my_needy:rows", "No module named 'not_there_at_all'"),
    ],
)
def test_functions_that_are_not_there(
    function: str, message: str, package: Path, tmp_path: Path
) -> None:
    (package / "my_data.py").write_text("NUMBER = 5\ndef rows(options, path): yield {}\n")
    (package / "my_broken.py").write_text("1 / 0\n")
    (package / "my_needy.py").write_text("import not_there_at_all\n")
    (package / "my_package").mkdir()
    (package / "my_package" / "__init__.py").touch()
    (package / "my_package" / "module.py").touch()
    with pytest.raises(DataError, match=message) as caught:
        read("python", ".", tmp_path, function=function)
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"source function {function}: ")


@pytest.mark.parametrize("function", ["rows", "module.rows", "a:b:c", "a:b.c", ":rows", "a b:c"])
def test_names_of_functions_are_checked_when_the_experiment_is_loaded(function: str) -> None:
    with pytest.raises(ValidationError, match="function"):
        config_of("python", "x", function=function)


def test_the_digest_follows_the_module_and_the_files(package: Path, tmp_path: Path) -> None:
    module = package / "my_digest.py"
    module.write_text("def rows(options, path): yield {}\n")
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    file = lines(data / "deep" / "x.jsonl", row_of("messages", 0))

    def digest() -> str:
        (shard,) = shards_of("python", "data", tmp_path, function="my_digest:rows")
        return shard.digest

    seen = [digest()]
    assert digest() == seen[0]
    lines(file, row_of("messages", 0), row_of("messages", 1))
    seen.append(digest())
    module.write_text(textwrap.dedent("def rows(options, path): yield {'a': 1}\n"))
    seen.append(digest())
    assert len(set(seen)) == 3
