"""Batches of every family: equal to the processor's own, and to their samples on their own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from made import picture
from plain_loss import plain_loss
from reading import sample

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.packed import SEGMENTS, joined
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.collate.positions import with_positions
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import ModelError
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.tiny import BUILDERS

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))
CHAT = [name for name in sorted(BUILDERS) if FAMILIES[name].prompt == "chat"]
PACKING = [name for name in sorted(BUILDERS) if FAMILIES[name].packing]
PADDED = {"llava_next": {"pixel_values"}, "llava_onevision": {"pixel_values"}}
PADDED["mllama"] = {"aspect_ratio_mask", "cross_attention_mask"}
"""What may differ from the processor's own batch: padding that the model does not look at."""


def samples(model_type):
    """Different lengths, image sizes and numbers of images; a text alone where there can be one."""
    # transformers lets Mllama's tokens ahead of the first image attend to padding where another
    # sample has more images (`_prepare_cross_attention_mask`).
    mixed = model_type != "mllama"
    made = [
        sample(model_type, "what?", "a bun", seed=1, height=96),
        sample(model_type, "hello you " * 4, "no", images=1 + mixed, seed=5, width=150, height=40),
        sample(model_type, "x", "longer answer", "and?", "two", seed=8, width=112, height=80),
    ]
    if FAMILIES[model_type].prompt == "chat" and mixed:
        made.append(sample(model_type, "text only", "fine", images=0))
    return made


def encoded(base, model_type):
    encoder = Encoder(base.processor, base.family)
    return [encoder.training(*entry) for entry in samples(model_type)]


def ready(base, rows, **options):
    """Batch and labels, as they go into the model."""
    pad = base.processor.tokenizer.pad_token_id
    batch = collate(rows, base.family, pad_token_id=pad, **options)
    labels = batch.pop("labels")
    batch = PixelTable(base.processor.image_processor, base.family)(batch)
    if SEGMENTS in batch:
        batch = with_positions(base.model, batch, base.family)
    return {**batch, "use_cache": False}, labels


@torch.no_grad()
def loss(base, rows, **options):
    batch, labels = ready(base, rows, **options)
    return float(plain_loss(base.model(**batch).logits, labels))


@FAMILY
def test_a_batch_has_the_loss_of_its_samples(model_type, tiny_base):
    base = tiny_base(model_type)
    rows = encoded(base, model_type)
    alone = sum(loss(base, [row]) for row in rows)
    assert loss(base, rows) == pytest.approx(alone, rel=1e-6)
    longest = max(len(row.input_ids) for row in rows)
    assert loss(base, rows, pad_to=longest + 13) == pytest.approx(alone, rel=1e-6)
    blank = Encoder(base.processor, base.family).blank()
    assert loss(base, [*rows, blank]) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("model_type", PACKING)
def test_packed_samples_have_the_loss_that_they_have_alone(model_type, tiny_base):
    base = tiny_base(model_type)
    rows = encoded(base, model_type)
    alone = sum(loss(base, [row]) for row in rows)
    for packs in ([rows], [rows[:2], rows[2:]], [rows[::-1][:3], rows[:1]]):
        packed = [joined(pack, base.family) for pack in packs]
        assert loss(base, packed) == pytest.approx(alone, rel=1e-6)


def test_samples_that_cannot_share_a_row_are_refused_before_the_start():
    with pytest.raises(ModelError, match=r"pack_tokens=64: samples of mllama cannot share a row"):
        FAMILIES["mllama"].check_packing(64)
    FAMILIES["mllama"].check_packing(None)


@pytest.mark.parametrize("model_type", CHAT)
def test_a_batch_is_the_processor_s_own(model_type, tiny_base):
    base = tiny_base(model_type)
    conversations = []
    for messages, images in samples(model_type)[:3]:
        remaining, messages = iter(images), copy.deepcopy(messages)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = next(remaining)
        conversations.append(messages)
    theirs = base.processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    ours, _ = ready(base, encoded(base, model_type)[:3])
    del ours["use_cache"]
    if model_type.startswith("gemma4"):  # ours has the thinking channel's tokens too
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["image_position_ids"], theirs["image_position_ids"])
        return
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - PADDED.get(model_type, set()):
        assert torch.equal(ours[name].to(theirs[name].dtype), theirs[name]), name
    with torch.no_grad():
        kept = ours["attention_mask"] == 1
        assert torch.equal(base.model(**ours).logits[kept], base.model(**theirs).logits[kept])


@FAMILY
def test_pixels_are_made_from_the_images_alone_as_with_the_tokens(model_type, tiny_base):
    base = tiny_base(model_type)
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    for (_, images), row in zip(samples(model_type), encoded(base, model_type), strict=True):
        made = maker.make([np.asarray(image) for image in images])
        for name, pixels in made.items():
            # Nemotron's processor resizes in float32 and does not round.
            assert pixels.dtype in (np.uint8, np.int8) or base.family.channels == "planar"
            assert np.array_equal(pixels, row.tensors[name])
        assert bool(made) == bool(images)


@FAMILY
def test_sizes_alone_give_the_same_sample_without_pixels(model_type, tiny_base):
    base = tiny_base(model_type)
    sizes = Encoder(base.processor, base.family, sizes_only=True)
    for entry, row in zip(samples(model_type), encoded(base, model_type), strict=True):
        blank = sizes.training(*entry)
        assert np.array_equal(blank.input_ids, row.input_ids) and blank.spans == row.spans
        for name, array in row.tensors.items():
            if name == "pixel_values":
                assert array.shape == blank.tensors[name].shape and not blank.tensors[name].any()
            else:
                assert np.array_equal(array, blank.tensors[name]), name


@FAMILY
def test_padding_carries_no_label_and_no_attention(model_type, tiny_base):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family, sizes_only=True)
    pad = base.processor.tokenizer.pad_token_id
    rows = [encoder.training(*sample(model_type, "q", "a" * size)) for size in (1, 30)]
    for side in ("right", "left"):
        batch = collate(rows, base.family, pad_token_id=pad, padding_side=side)
        name = "attention_mask" if "decoder_input_ids" not in batch else "decoder_attention_mask"
        padding = batch[name] == 0
        assert padding[0].sum() == 29 and padding[1].sum() == 0
        assert bool((batch["labels"][padding] == IGNORED).all())
        assert int((batch["labels"] != IGNORED).sum()) == sum(row.num_labelled for row in rows)


@FAMILY
def test_images_of_any_mode_are_read_as_rgb(model_type, tiny_base):
    base = tiny_base(model_type)
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    from raytune_vlm.images import decode, encode_png

    for mode in ("L", "RGBA", "P", "1"):
        image = picture(3).convert(mode)
        data = encode_png(image)
        made = maker.decode([data])
        expected = maker.make([decode(data, ImageLimits())])
        assert np.array_equal(made["pixel_values"], expected["pixel_values"])
