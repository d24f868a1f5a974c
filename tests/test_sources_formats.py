"""What the formats of tables make of rows, and what they refuse."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from test_sources import config_of, lines, png, read, reasons
from test_sources_containers import parquet

from raytune_vlm.records import Sample
from raytune_vlm.sources.base import RowError, make_sample


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


def calling(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def tool() -> dict[str, Any]:
    return {"role": "tool", "content": "found"}


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
        ({"messages": [user("a"), calling("{}"), tool(), answer()], "tools": "[{}]"}, ""),
        ({"messages": [user("a"), calling({"x": 1}), tool(), tool(), answer()]}, ""),
        ({"messages": [user("a"), calling("{")]}, "turn 2: the arguments of look is not JSON: {"),
        ({"messages": [user("a"), calling({})]}, "the last turn calls tools"),
        ({"messages": [user("a"), calling({}), answer()]}, "turn 3 is 'assistant' where 'tool'"),
        ({"messages": [user("a"), tool(), answer()]}, "turn 2 is 'tool' where 'assistant'"),
        ({"messages": [user("a"), answer()], "tools": "[1]"}, "column 'tools' must hold a list"),
        (
            {"messages": [user("a"), {**answer(), "tool_calls": [{}]}]},
            "turn 2: a tool call has no function with a name",
        ),
    ],
)
def test_messages(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (found,) = reasons(read("messages", lines(tmp_path / "x.jsonl", row), tmp_path))
    assert found.startswith(reason)
    assert bool(found) is bool(reason)


def test_tools_and_calls_are_part_of_the_sample(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    talk = [user("a"), calling('{"x": 1}'), tool(), answer()]
    rows = [{"messages": talk, "tools": tools}, {"messages": talk, "tools": json.dumps(tools)}]
    first, second = read("messages", lines(tmp_path / "x.jsonl", *rows), tmp_path)
    (without,) = read("messages", lines(tmp_path / "y.jsonl", {"messages": talk}), tmp_path)
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert first.tools == second.tools == tools and first.sample_id == second.sample_id
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert isinstance(without, Sample) and without.sample_id != first.sample_id


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


# --- prompt and completion


def images_at(sample: Any) -> list[str]:
    return [part.get("text", "<image>") for part in sample.messages[0]["content"]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "images": [URI, URI]}, ["<image>", "<image>", "a"]),
        ({"prompt": "a<image>c", "completion": "b", "images": [URI]}, ["a", "<image>", "c"]),
        ({"prompt": "a", "completion": "b", "images": []}, ["a"]),
        ({"prompt": "a", "completion": "b"}, ["a"]),
        (
            {"prompt": [user("a")], "completion": [answer()], "images": [URI]},
            ["<image>", "a"],
        ),
        (
            {
                "prompt": [user({"type": "text", "text": "a"}, {"type": "image"})],
                "completion": [answer()],
                "images": [URI],
            },
            ["a", "<image>"],
        ),
        (
            {
                "prompt": [user({"type": "image", "image": URI}, {"type": "text", "text": "a"})],
                "completion": [answer()],
            },
            ["<image>", "a"],
        ),
    ],
)
def test_prompt_completion(row: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    (sample,) = read("prompt_completion", lines(tmp_path / "x.jsonl", row), tmp_path)
    assert isinstance(sample, Sample), sample
    assert images_at(sample) == expected
    assert len(sample.images) == expected.count("<image>")


def test_prompt_completion_images_go_to_the_first_user_turn(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "s"}, user("a"), answer(), user("c")]
    row = {"prompt": prompt, "completion": [answer("d")], "images": URI}
    (sample,) = read("prompt_completion", lines(tmp_path / "x.jsonl", row), tmp_path)
    assert isinstance(sample, Sample)
    assert sample.messages[1] == turn("user", "<image>", "a")
    assert sample.messages[3] == turn("user", "c")
    assert sample.answer == "d"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "no column 'completion'"),
        ({"prompt": None, "completion": "b"}, "column 'prompt' is null"),
        ({"prompts": "a", "completion": "b"}, "no column 'prompt' (did you mean 'prompts'?)"),
        (
            {"prompt": "a", "completion": [answer()]},
            "columns must both be texts or both be lists of messages: 'prompt' is str and "
            "'completion' is list",
        ),
        ({"prompt": 5, "completion": 6}, "column 'prompt' must be a list, not int"),
        ({"prompt": "a", "completion": " "}, "turn 2 (assistant) is empty"),
        ({"prompt": "a", "completion": "b<image>", "images": [URI]}, "turn 2 (assistant) holds"),
        (
            {"prompt": "<image><image>", "completion": "b", "images": [URI]},
            "2 <image> placeholders but 1 image",
        ),
        ({"prompt": "<image>", "completion": "b", "image": URI}, "1 <image> placeholder but 0 ima"),
        ({"prompt": [user("a")], "completion": []}, "the last turn is 'user'"),
        ({"prompt": [], "completion": [answer()], "images": [URI]}, "turn 1 is 'assistant' where"),
    ],
)
def test_prompt_completion_refuses(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (found,) = reasons(read("prompt_completion", lines(tmp_path / "x.jsonl", row), tmp_path))
    assert found.startswith(reason)


# --- templates, several parses


def test_a_text_made_of_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [png()] * 4,
            "item name": ["Sword", "Bow", None, "Axe"],
            "description": ["Sharp.", "{bent}", "x", "y"],
            "weight": [1.5, 2.0, 3.0, None],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    template = "{item name} {{{weight}}}: {description}"
    found = read("image_text", "x.parquet", tmp_path, text_template=template)
    answers = [item.answer for item in found if isinstance(item, Sample)]
    assert answers == ["Sword {1.5}: Sharp.", "Bow {2.0}: {bent}"]
    assert reasons(found)[2:] == ["column 'item name' is null", "column 'weight' is null"]
    (bad, *_) = reasons(read("image_text", "x.parquet", tmp_path, text_template="{descripton}"))
    assert bad == "no column 'descripton' (did you mean 'description'?)"
    lines(tmp_path / "x.jsonl", {"image": URI, "a": [1]}, {"image": URI, "a": True})
    found = read("image_text", "x.jsonl", tmp_path, text_template="{a}")
    assert reasons(found) == [
        "column 'a' must be a string or a number, not list",
        "column 'a' must be a string or a number, not bool",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_template": "{a"}, "expected '}'"),
        ({"text_template": "a}"}, "Single '}'"),
        ({"text_template": "a"}, "the template names no column"),
        ({"text_template": "{}"}, "must be the name of a column"),
        ({"text_template": "{a!r}"}, "must be the name of a column"),
        ({"text_template": "{a:>9}"}, "must be the name of a column"),
        ({"text_template": "{a}", "text_column": "b"}, "text_column and text_template exclude"),
    ],
)
def test_templates_are_checked_when_the_experiment_is_loaded(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of("image_text", "x.jsonl", **options)


def test_a_seeded_choice_belongs_to_the_document(tmp_path: Path) -> None:
    parses = [[{"a": f"{n}.{k}"} for k in range(3)] for n in range(40)]
    rows = [{"image": URI, "ground_truth": {"gt_parses": several}} for several in parses]

    def answers(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        found = read("cord", lines(tmp_path / "x.jsonl", *rows), tmp_path, **options)
        return [item.answer for item in found if isinstance(item, Sample)]

    assert answers(rows) == [f"<s_a>{n}.0</s_a>" for n in range(40)]
    drawn = answers(rows, choice="seeded", seed=1)
    assert {text.removesuffix("</s_a>")[-1] for text in drawn} == {"0", "1", "2"}
    assert answers(rows[::-1], choice="seeded", seed=1) == drawn[::-1]
    assert answers(rows, choice="seeded", seed=2) != drawn
