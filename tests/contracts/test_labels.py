"""Labels of every family against an independent reading of the rendered conversation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import picture, turn
from reading import (
    NASTY,
    expected_texts,
    is_single_turn,
    num_images,
    plain,
    sample,
    without_answer_prefix,
)

from raytune_vlm.collate.encode import Encoder, media_ids
from raytune_vlm.collate.encoded import SampleRefused
from raytune_vlm.collate.labels import structural_tokens
from raytune_vlm.models.tiny import BUILDERS

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))


@pytest.fixture(scope="session")
def encoder(tiny_base):
    made = {}

    def get(model_type):
        if model_type not in made:
            base = tiny_base(model_type)
            made[model_type] = Encoder(base.processor, base.family, sizes_only=True)
        return made[model_type]

    return get


def check_reading(base, encoder, messages, images):
    encoded = encoder.training(messages, images)
    decode = base.processor.tokenizer.decode
    labelled, left = expected_texts(base, messages)
    assert [decode(encoded.input_ids[start:end]) for start, end in encoded.spans] == labelled
    outside = np.ones(len(encoded.input_ids), dtype=bool)
    for start, end in encoded.spans:
        outside[start:end] = False
    rest = plain(decode(encoded.input_ids[outside]), base)
    assert without_answer_prefix(rest, base.family) == without_answer_prefix(left, base.family)
    assert not np.isin(encoded.input_ids[~outside], media_ids(base.processor)).any()


def texts(base):
    control = list(structural_tokens(base.processor.tokenizer, base.family).values())
    pieces = st.one_of(st.sampled_from(NASTY), st.text(alphabet="abc XYZ:.\n<>|/_", max_size=12))
    return (
        st.lists(pieces, min_size=1, max_size=4)
        .map("".join)
        .filter(lambda text: text.strip() and not any(token in text for token in control))
    )


@FAMILY
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_random_conversations_are_labelled_as_they_read(model_type, tiny_base, encoder, data):
    base = tiny_base(model_type)
    text = texts(base)
    pairs = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    if is_single_turn(model_type):
        pairs = pairs[:1]
    messages, images = [], []
    if not is_single_turn(model_type) and data.draw(st.booleans()):
        messages.append(turn("system", data.draw(text)))
    for place, (question, answer) in enumerate(pairs):
        count = data.draw(st.integers(0, 3)) if place == 0 else data.draw(st.integers(0, 1))
        count = num_images(model_type, count)
        images += [picture(number, 40 + 8 * number, 48) for number in range(count)]
        messages.append(turn("user", question, count))
        # An answer that repeats the question must not be taken for it.
        repeated = question + answer
        control = structural_tokens(base.processor.tokenizer, base.family).values()
        if data.draw(st.booleans()) and not any(token in repeated for token in control):
            answer = repeated
        messages.append(turn("assistant", answer))
    check_reading(base, encoder(model_type), messages, images)


@FAMILY
def test_a_very_long_turn_is_labelled_to_its_end(model_type, tiny_base, encoder):
    base = tiny_base(model_type)
    messages, images = sample(model_type, "Read. " * 300, "word " * 300 + "end")
    check_reading(base, encoder(model_type), messages, images)


@FAMILY
def test_control_tokens_in_a_text_are_refused_by_name(model_type, tiny_base, encoder):
    base = tiny_base(model_type)
    for token in structural_tokens(base.processor.tokenizer, base.family).values():
        for question, answer in ((f"q{token}y", "a"), ("q", f"a{token}y")):
            messages, images = sample(model_type, question, answer)
            with pytest.raises(SampleRefused, match="control token"):
                encoder(model_type).training(messages, images)


@FAMILY
@pytest.mark.parametrize("more", [1, -1])
def test_an_image_too_many_or_too_few_is_refused_with_both_counts(model_type, encoder, more):
    messages, images = sample(model_type, "q", "a", images=2)
    count = len(images)
    images = [*images, picture(9)] if more == 1 else images[:-1]
    with pytest.raises(SampleRefused, match=f"{count} places for images but {count + more} images"):
        encoder(model_type).training(messages, images)


@pytest.mark.parametrize("model_type", [name for name in sorted(BUILDERS) if is_single_turn(name)])
@pytest.mark.parametrize("roles", [["system", "user", "assistant"], ["user", "assistant"] * 2])
def test_turns_that_a_model_has_no_place_for_are_refused(model_type, roles, encoder):
    messages = [turn(role, "text", int(place == 0)) for place, role in enumerate(roles)]
    with pytest.raises(SampleRefused, match="takes one question and one answer"):
        encoder(model_type).training(messages, [picture(0)])


def test_gemma_4_s_empty_thinking_channel_is_there_and_carries_no_loss(tiny_base, encoder):
    base = tiny_base("gemma4")
    messages, images = sample("gemma4", "first?", "one", "second?", "two")
    encoded = encoder("gemma4").training(messages, images)
    tokenizer = base.processor.tokenizer
    prefix = tokenizer("<|channel>thought\n<channel|>", add_special_tokens=False)["input_ids"]
    for start, end in encoded.spans:
        assert encoded.input_ids[start - len(prefix) : start].tolist() == prefix
        assert "thought" not in tokenizer.decode(encoded.input_ids[start:end])
    kinds = encoded.tensors["mm_token_type_ids"]
    assert len(kinds) == len(encoded.input_ids)
    image = tokenizer.convert_tokens_to_ids(base.processor.image_token)
    assert np.array_equal(kinds == 1, encoded.input_ids == image)
    asked = encoder("gemma4").prompt(messages[:1], images)
    assert asked.input_ids.tolist() == encoded.input_ids[: encoded.spans[0][0]].tolist()


@FAMILY
def test_a_prompt_is_the_training_sample_up_to_its_answer(model_type, tiny_base, encoder):
    messages, images = sample(model_type, "What is it?", "a bun")
    whole = encoder(model_type).training(messages, images)
    asked = encoder(model_type).prompt(messages[:1], images)
    start = whole.spans[0][0]
    assert asked.spans == []
    assert asked.input_ids.tolist() == whole.input_ids[:start].tolist()
    assert asked.tensors.keys() == whole.tensors.keys()


@FAMILY
def test_truncation_keeps_media_whole_or_gives_up(model_type, encoder):
    messages, images = sample(model_type, "q", "a long answer that is cut")
    encoded = encoder(model_type).training(messages, images)
    first = encoded.spans[0][0]
    cut = encoder(model_type).truncated(encoded, first + 3)
    assert len(cut.input_ids) == first + 3 and cut.spans == [(first, first + 3)]
    assert encoder(model_type).num_media(cut) == encoder(model_type).num_media(encoded)
    for name, array in cut.tensors.items():
        whole = encoded.tensors[name]
        assert array.shape[1:] == whole.shape[1:]
        assert len(array) == (first + 3 if len(whole) == len(encoded.input_ids) else len(whole))
    assert encoder(model_type).truncated(encoded, first) is None


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "bun"}}}
WITH_TOOLS = [
    turn("user", "What does it cost?", 1),
    {"role": "assistant", "content": [], "tool_calls": [CALL]},
    turn("tool", "3.20"),
    turn("assistant", "It costs 3.20"),
]


@FAMILY
def test_tool_calls_are_labelled_or_refused_and_never_left_out(model_type, tiny_base, encoder):
    decode = tiny_base(model_type).processor.tokenizer.decode
    if "tool_calls" not in str(tiny_base(model_type).processor.chat_template):
        with pytest.raises(SampleRefused, match=r"leaves out tools|has no place for them"):
            encoder(model_type).training(WITH_TOOLS, [picture(0)], TOOLS)
        return
    encoded = encoder(model_type).training(WITH_TOOLS, [picture(0)], TOOLS)
    called, answered = (decode(encoded.input_ids[start:end]) for start, end in encoded.spans)
    assert called.startswith("<tool_call>") and '"word": "bun"' in called
    assert answered == "It costs 3.20<|im_end|>"
    assert "look_up" in decode(encoded.input_ids[: encoded.spans[0][0]])
    asked = encoder(model_type).prompt(WITH_TOOLS[:3], [picture(0)], TOOLS)
    assert asked.input_ids.tolist() == encoded.input_ids[: encoded.spans[1][0]].tolist()
