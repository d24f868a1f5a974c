"""Collation over the FAMILIES table: labels, pixels, padding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import picture, turn

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encode import Encoded, Encoder, SampleRefused
from raytune_vlm.collate.labels import control_tokens
from raytune_vlm.models.tiny import BUILDERS

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))


def labelled_texts(encoder: Encoder, encoded: Encoded) -> list[str]:
    tokenizer = encoder.processor.tokenizer
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans]


@FAMILY
def test_labels_cover_the_assistant_turns_and_their_end_only(model_type, tiny_base):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family)
    conversation = [
        turn("user", "What is the answer?", images=1),
        turn("assistant", "What is the answer?"),
        turn("user", "Again: yes"),
        turn("assistant", "yes"),
    ]
    encoded = encoder.training(conversation, [picture(0)])
    first, second = labelled_texts(encoder, encoded)
    assert first.startswith("What is the answer?") and second.startswith("yes")
    ends = {first.removeprefix("What is the answer?"), second.removeprefix("yes")}
    assert len(ends) == 1 and ends.pop() in control_tokens(base.processor.tokenizer).values()


@FAMILY
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_conversations_are_labelled_exactly(model_type, tiny_base, data):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family)
    control = control_tokens(base.processor.tokenizer).values()
    word = st.text(alphabet="abc XYZ:.assistantmodel<>|", min_size=1, max_size=24).filter(
        lambda text: text.strip() == text and not any(token in text for token in control)
    )
    pairs = data.draw(st.lists(st.tuples(word, word), min_size=1, max_size=3))
    conversation = [
        message
        for place, (question, answer) in enumerate(pairs)
        for message in (turn("user", question, images=int(place == 0)), turn("assistant", answer))
    ]
    encoded = encoder.training(conversation, [picture(1)])
    end = base.processor.tokenizer.decode(encoded.input_ids[encoded.spans[0][1] - 1])
    assert labelled_texts(encoder, encoded) == [answer + end for _, answer in pairs]


@FAMILY
def test_pixels_stay_uint8_and_equal_the_processor_s_after_the_table(model_type, tiny_base):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family)
    images = [picture(seed, height=40 + 16 * seed) for seed in range(3)]
    conversations = [[turn("user", "q" * 3**n, 1), turn("assistant", "a")] for n in range(3)]
    samples = [
        encoder.training(conversation, [image])
        for conversation, image in zip(conversations, images, strict=True)
    ]
    stored = np.float32 if base.family.channels == "planar" else np.uint8
    assert all(sample.tensors["pixel_values"].dtype == stored for sample in samples)
    pad = base.processor.tokenizer.pad_token_id
    batch = collate(samples, base.family, pad_token_id=pad)
    batch = PixelTable(base.processor.image_processor, base.family)(batch)
    for conversation, image in zip(conversations, images, strict=True):
        conversation[0]["content"][0]["image"] = image
    expected = base.processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert set(batch) == {*expected, "labels"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name].to(tensor.dtype), tensor), name


@FAMILY
def test_padding_carries_no_label_and_no_attention(model_type, tiny_base):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family)
    samples = [
        encoder.training([turn("user", "q" * size, 1), turn("assistant", "a")], [picture(size)])
        for size in (1, 30)
    ]
    for side in ("right", "left"):
        batch = collate(samples, base.family, pad_token_id=0, padding_side=side)
        padding = batch["attention_mask"] == 0
        assert padding[0].sum() == 29 and padding[1].sum() == 0
        assert bool((batch["labels"][padding] == IGNORED).all())
        assert int((batch["labels"] != IGNORED).sum()) == sum(s.num_labelled for s in samples)


@FAMILY
def test_control_tokens_in_a_text_are_refused_by_name(model_type, tiny_base):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family)
    for token in control_tokens(base.processor.tokenizer).values():
        for place in (0, 1):
            texts = ["q", "a"]
            texts[place] += f"{token}y"
            with pytest.raises(SampleRefused, match="control token"):
                encoder.training(
                    [turn("user", texts[0], 1), turn("assistant", texts[1])], [picture(0)]
                )


@FAMILY
def test_several_images_keep_their_order_and_count(model_type, tiny_base):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family)
    images = [picture(seed) for seed in (1, 2)]
    both = encoder.training([turn("user", "q", 2), turn("assistant", "a")], images)
    single = [
        encoder.training([turn("user", "q", 1), turn("assistant", "a")], [image])
        for image in images
    ]
    expected = np.concatenate([sample.tensors["pixel_values"] for sample in single])
    assert np.array_equal(both.tensors["pixel_values"], expected)


def test_a_mask_that_does_not_lie_on_the_answer_is_refused(tiny_base):
    base = tiny_base("nemotron_h_omni")  # its processor expands image tokens, but not the mask
    processor = copy.copy(base.processor)
    processor.chat_template = processor.chat_template.replace(
        "{{ part['text'] }}",
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ part['text'] }}{% endgeneration %}"
        "{% else %}{{ part['text'] }}{% endif %}",
    )
    encoder = Encoder(processor, base.family)
    sample = [turn("user", "What is it?", 1), turn("assistant", "a cat")]
    with pytest.raises(SampleRefused, match=r"mask lies on .*, not on the answer 'a cat'"):
        encoder.training(sample, [picture(0)])
