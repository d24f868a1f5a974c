"""References: plain text stays plain, JSON of the known keys holds more."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_vlm.references import Reference, join_references, read_reference

ANY = st.text(max_size=20)
REFERENCES = st.builds(
    Reference,
    answers=st.lists(ANY, min_size=1, max_size=3).map(tuple),
    choices=st.lists(ANY, max_size=3).map(tuple),
    type=st.sampled_from(["", "open"]),
    category=ANY,
    precision=st.none() | st.integers(0, 20),
)


def test_all_keys() -> None:
    text = (
        '{"answers": ["B", 2], "choices": ["x", 1.5], "type": "t", "category": "c", "precision": 1}'
    )
    assert read_reference(text) == Reference(("B", "2"), ("x", "1.5"), "t", "c", 1)


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "",
        '{"total": "5"}',
        '{"answers": "yes"}',
        '{"answers": []}',
        '{"answers": ["yes"], "other": 1}',
        '{"answers": [["yes"]]}',
        '{"answers": ["yes"], "precision": "1"}',
        '{"answers": ["yes"], "precision": true}',
        '{"answers": ["yes"]',
        '["answers"]',
        '{"answers": ' + "[" * 100_000,
        '{"answers": [' + "9" * 5_000 + "]}",
        "شاي",
    ],
)
def test_anything_else_is_one_plain_answer(text: str) -> None:
    assert read_reference(text) == Reference((text,))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(REFERENCES)
def test_what_is_written_is_read(reference: Reference) -> None:
    assert read_reference(reference.to_text()) == reference


def test_a_document_that_looks_like_a_reference_can_still_be_an_answer() -> None:
    document = json.dumps({"answers": ["x"], "type": "list"})
    assert Reference(("plain",)).to_text() == "plain"
    assert read_reference(Reference((document,)).to_text()).answers == (document,)


def test_joined_references_keep_every_answer() -> None:
    other = Reference(("c",), ("x", "y"), category="k").to_text()
    assert join_references(["a", "b", other]) == Reference(
        ("a", "b", "c"), ("x", "y"), category="k"
    )
