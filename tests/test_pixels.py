"""Fast pixels: bit-equal to the image processor of the named backend, whole images for patches."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from made import picture
from PIL import Image

from raytune_vlm.collate.batch import PixelTable
from raytune_vlm.collate.pixels import PixelMaker, fast_image_processor
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.images import decode, decode_pixels
from raytune_vlm.models.image_backends import image_backend
from raytune_vlm.models.tiny import BUILDERS

FAMILY = pytest.mark.parametrize("model_type", sorted(BUILDERS))
SIZES = [(64, 48), (31, 90), (300, 220), (57, 57), (640, 480), (33, 410)]


def jpeg(image, quality=85, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, **options)
    return buffer.getvalue()


def processed(maker, image_processor, family, data, backend=None):
    """The float pixels that reach the vision tower, and those of the processor."""
    made = {name: torch.from_numpy(value) for name, value in maker.decode([data]).items()}
    if family.media["pixel_values"] == "samples":
        made = {name: value[None] for name, value in made.items()}
    given = image_processor([decode(data, ImageLimits())], return_tensors="np")
    others = {name: torch.as_tensor(given[name]) for name in family.media if name in given}
    table = PixelTable(image_processor, family, backend=backend)
    return table({**others, **made})[family.pixels].numpy(), np.asarray(given[family.pixels])


@FAMILY
def test_pixels_equal_those_of_the_processor_bit_for_bit(model_type, tiny_base):
    base = tiny_base(model_type)
    image_processor = base.processor.image_processor
    maker = PixelMaker(image_processor, base.family, None, ImageLimits())
    for number, size in enumerate(SIZES):
        ours, theirs = processed(maker, image_processor, base.family, jpeg(picture(number, *size)))
        assert ours.dtype == theirs.dtype == np.float32
        assert np.array_equal(ours, theirs), size


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_torchvision_pixels_equal_its_processor_where_it_is_installed(model_type, tiny_model):
    pytest.importorskip("torchvision")
    from transformers import AutoImageProcessor

    from raytune_vlm.models.families import FAMILIES

    theirs = AutoImageProcessor.from_pretrained(tiny_model(model_type), backend="torchvision")
    pillow = AutoImageProcessor.from_pretrained(tiny_model(model_type), backend="pil")
    maker = PixelMaker(pillow, FAMILIES[model_type], "torchvision", ImageLimits())
    for number, size in enumerate(SIZES):
        data = jpeg(picture(number, *size))
        ours, _ = processed(maker, pillow, FAMILIES[model_type], data, "torchvision")
        expected = theirs([decode(data, ImageLimits())], return_tensors="pt")["pixel_values"]
        assert np.array_equal(ours, expected.numpy())


def test_the_backends_differ_but_little(tiny_base):
    base = tiny_base("qwen2_5_vl")
    image_processor = base.processor.image_processor
    data = jpeg(picture(1, 300, 220))
    made = [
        PixelMaker(image_processor, base.family, backend, ImageLimits()).decode([data])
        for backend in ("pil", "torchvision")
    ]
    first, second = (entry["pixel_values"].astype(int) for entry in made)
    assert 0 < np.abs(first - second).max() <= 24
    assert np.abs(first - second).mean() < 1


def test_a_filter_that_torch_lacks_is_an_error(tiny_base):
    base = tiny_base("idefics3")  # resizes with Lanczos
    maker = PixelMaker(base.processor.image_processor, base.family, "torchvision", ImageLimits())
    with pytest.raises(ModelError, match=r"resizes with LANCZOS.*image_backend: pil"):
        maker.decode([jpeg(picture(1, 300, 220))])


def test_a_class_of_torchvision_alone_does_not_resample_as_pillow_does(tiny_base):
    base = tiny_base("kimi_k25")
    with pytest.raises(ModelError, match=r"Kimi_K25ImageProcessor.*use .*torchvision"):
        image_backend(ModelConfig(name="x", image_backend="pil"), base.processor.image_processor)
    with pytest.raises(ModelError, match="cannot be made with pil"):
        fast_image_processor(base.processor.image_processor, base.family, "pil")


def test_images_are_padded_with_zeros_after_normalisation(tiny_base):
    base = tiny_base("pixtral")
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    images = [picture(1, 70, 28), picture(2, 28, 84)]
    sizes = torch.tensor([[28, 70], [84, 28]])
    made = torch.from_numpy(maker.make(images)["pixel_values"])
    batch = {"pixel_values": made, "image_sizes": sizes}
    table = PixelTable(base.processor.image_processor, base.family)
    expected = base.processor.image_processor(images, return_tensors="pt")
    assert torch.equal(torch.as_tensor(expected["image_sizes"]), sizes)
    assert torch.equal(table(batch)["pixel_values"], expected["pixel_values"])


@FAMILY
def test_sizes_alone_cost_no_resampling_and_are_right(model_type, tiny_base):
    base = tiny_base(model_type)
    image_processor = base.processor.image_processor
    sizes = fast_image_processor(image_processor, base.family, sizes_only=True)
    image = picture(2, 300, 220)
    settings = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    blank = sizes([image], **settings)
    whole = fast_image_processor(image_processor, base.family)([image], **settings)
    name = base.family.pixels
    assert blank[name].shape == whole[name].shape
    assert not blank[name].any() and whole[name].any()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_files_decode_to_pillow_s_pixels(mode, options):
    for seed in range(5):
        data = jpeg(picture(seed, 61 + seed, 47).convert(mode), **options)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(decode_pixels(data, ImageLimits()), expected)
