"""Augmentation: a pure function, within its bounds, off unless asked for."""

from __future__ import annotations

import numpy as np
import pytest
from made import picture
from PIL import Image
from pydantic import ValidationError

from raytune_vlm.collate.augment import augment
from raytune_vlm.config.augmentation import AugmentationConfig

ALL = AugmentationConfig(
    brightness=0.2,
    contrast=0.2,
    saturation=0.3,
    jpeg_quality=(40, 80),
    jpeg_probability=1.0,
    max_rotation_degrees=3,
    min_crop=0.9,
)


def changed(image, config, sample_id="s", draw=0, place=0, seed=1):
    made = augment(image, config, seed=seed, sample_id=sample_id, draw=draw, place=place)
    return np.asarray(made)


def test_nothing_is_changed_unless_asked_for():
    image = picture(1)
    assert np.array_equal(changed(image, AugmentationConfig()), np.asarray(image))


def test_the_same_sample_draw_and_seed_give_the_same_picture():
    image = picture(1)
    first = changed(image, ALL)
    assert np.array_equal(first, changed(image, ALL))
    for other in ({"sample_id": "t"}, {"draw": 1}, {"place": 1}, {"seed": 2}):
        assert not np.array_equal(first, changed(image, ALL, **other))


def test_the_size_stays_and_so_does_the_picture_for_the_most_part():
    gradient = np.linspace(40, 200, 90, dtype=np.uint8)[None, :, None].repeat(60, 0).repeat(3, 2)
    image = Image.fromarray(gradient)
    for draw in range(20):
        made = changed(image, ALL, draw=draw)
        assert made.shape == gradient.shape
        assert np.corrcoef(made.ravel(), gradient.ravel())[0, 1] > 0.9


def test_brightness_stays_within_its_bound_and_uses_it():
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    config = AugmentationConfig(brightness=0.2)
    means = [changed(grey, config, draw=draw).mean() for draw in range(60)]
    assert min(means) >= 79 and max(means) <= 121
    assert min(means) < 87 and max(means) > 113


def test_a_crop_keeps_at_least_its_share():
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = Image.fromarray(columns).convert("RGB")
    config = AugmentationConfig(min_crop=0.8)
    kept = [np.ptp(changed(image, config, draw=draw)[50, :, 0]) for draw in range(60)]
    assert min(kept) >= 0.8 * 199 - 3
    assert min(kept) < 0.86 * 199 and max(kept) > 0.95 * 199


def test_corners_of_a_rotation_have_the_colour_of_the_border():
    paper = Image.new("RGB", (80, 60), (230, 228, 220))
    made = changed(paper, AugmentationConfig(max_rotation_degrees=10))
    assert np.array_equal(np.unique(made.reshape(-1, 3), axis=0), [[230, 228, 220]])


@pytest.mark.parametrize(
    "setting",
    [
        {"brightness": 0.9},
        {"min_crop": 0.2},
        {"jpeg_quality": (80, 40)},
        {"max_rotation_degrees": 90},
    ],
)
def test_ranges_that_make_text_unreadable_are_refused(setting):
    with pytest.raises(ValidationError):
        AugmentationConfig(**setting)
