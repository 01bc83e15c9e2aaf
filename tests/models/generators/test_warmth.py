"""Warm pictures: tones by class, aligned with their label, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from models.generators.warmth import Warmth


def scene(seed=0):
    """A visible picture uint8 [32, 48, 3] and its label: a square of class 2, and an unknown corner."""
    label = np.zeros((32, 48), np.uint8)
    label[8:24, 12:32], label[:4, :4] = 2, 255
    picture = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return picture, label


def examples(seeds=(0, 1)):
    """Infrared frames whose background is 40 and whose class 2 is 200, give or take."""
    for seed in seeds:
        _, label = scene(seed)
        grey = np.where(label == 2, 200.0, 40.0) + np.random.default_rng(seed).normal(0, 5, label.shape)
        grey[label == 255] = 255
        yield grey.clip(0, 255).astype(np.uint8), label


@pytest.fixture(scope="module")
def warmth():
    return Warmth.fit(examples(), classes=3)


def test_tones_are_means_of_known_pixels(warmth):
    assert warmth.tone[[0, 2]] == pytest.approx([40, 200], abs=1)
    assert warmth.spread[[0, 2]] == pytest.approx([5, 5], abs=1)
    assert warmth.tone[1] == warmth.tone[3] == warmth.tone[0], "a class that was never seen is as the background"


def test_a_picture_is_warm_where_its_label_says(warmth):
    picture, label = scene(5)
    found = warmth.translate(picture, label, seed=1)
    assert found.shape == label.shape and found.dtype == np.uint8
    assert found[12:20, 16:28].mean() == pytest.approx(200, abs=4)
    assert found[26:, :8].mean() == pytest.approx(40, abs=4) and found[:3, :3].mean() == pytest.approx(40, abs=6)


def test_light_and_shade_of_the_picture_remain():
    calm = Warmth(np.array([100.0]), np.array([30.0]), blur=0.1, noise=0.0)
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, 4:] = 200
    found = calm.translate(picture, np.zeros((8, 8), np.uint8), seed=0)
    assert (found[:, 0] == 70).all() and (found[:, 7] == 130).all()
    flat = calm.translate(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8), seed=0)
    assert (flat == 100).all(), "an even picture has no detail"


def test_it_is_a_function_of_its_seed(warmth):
    given = scene()
    assert (warmth.translate(*given, seed=3) == warmth.translate(*given, seed=3)).all()
    assert (warmth.translate(*given, seed=3) != warmth.translate(*given, seed=4)).any()
