"""Conversions against skimage, crops, padding, and what the edge score calls good."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from models.generators import pictures


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_lightness_is_that_of_cielab(rng):
    rgb = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    expected = rgb2lab(rgb)[..., 0] * 2.55
    assert np.abs(pictures.lightness_picture(rgb) - expected).max() <= 0.6
    grey = np.repeat(np.array([0, 255], np.uint8)[:, None], 3, 1)[None]
    assert pictures.lightness_picture(grey).tolist() == [[0, 255]]


def test_pictures_survive_the_way_there_and_back(rng):
    for shape in [(5, 7), (5, 7, 3)]:
        picture = rng.integers(0, 256, shape, dtype=np.uint8)
        tensor = pictures.to_tensor(picture)
        assert tensor.min() >= -1 and tensor.max() <= 1
        assert np.array_equal(pictures.to_picture(tensor), picture)


@pytest.mark.parametrize(("size", "short_side"), [((40, 60), None), ((40, 60), 80), ((20, 90), None), ((90, 20), 33)])
def test_crops_have_the_asked_size(rng, size, short_side):
    crop = pictures.random_crop(rng.integers(0, 256, (*size, 3), dtype=np.uint8), 32, short_side, rng)
    assert crop.shape == (3, 32, 32) and crop.abs().max() <= 1.0001


def test_crops_scale_by_the_short_side():
    """A ramp over 32 columns, scaled to at least 64, climbs at most half as fast."""
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    crop = pictures.random_crop(ramp, 32, 64, np.random.default_rng(0))
    assert 0.4 < float((crop[0, 0, -1] - crop[0, 0, 0]).abs() / (pictures.to_tensor(ramp)[0, 0].diff().sum())) < 0.55


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (1, 2)])
def test_padding_reaches_the_stride_and_keeps_the_corner(size):
    images = torch.rand(1, 2, *size)
    padded = pictures.pad_to_stride(images, 8)
    assert padded.shape[2] % 8 == 0 and padded.shape[3] % 8 == 0
    assert torch.equal(padded[:, :, : size[0], : size[1]], images)
    if size == (9, 15):
        assert torch.equal(padded[:, :, 9], padded[:, :, 7]), "reflected"


def shapes(rng) -> np.ndarray:
    picture = np.full((48, 48), 60, np.uint8)
    picture[8:30, 10:25] = 200
    picture[25:44, 30:44] = 130
    return picture


def test_edges_agree_up_to_polarity(rng):
    picture = shapes(rng)
    noise = rng.integers(0, 256, picture.shape, dtype=np.uint8)
    assert pictures.edge_agreement(picture, picture) == pytest.approx(1, abs=1e-5)
    assert pictures.edge_agreement(picture, 255 - picture) == pytest.approx(1, abs=1e-5)
    assert pictures.edge_agreement(picture, np.repeat((picture // 2)[..., None], 3, 2)) > 0.99
    assert abs(pictures.edge_agreement(picture, noise)) < 0.2
    assert pictures.edge_agreement(picture, np.roll(picture, 5, 1)) < 0.6
    assert pictures.edge_agreement(picture, np.full_like(picture, 9)) == 0


def test_edges_at_right_angles_score_below_zero():
    stripes = np.tile(np.arange(48, dtype=np.uint8) * 5, (48, 1))
    assert pictures.edge_agreement(stripes, stripes.T) == pytest.approx(-1, abs=1e-4)


def test_structure_loss_falls_as_edges_return(rng):
    source = pictures.to_tensor(shapes(rng))[None]
    drawn = (torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(0)) * 0.3).requires_grad_()
    losses = []
    optimiser = torch.optim.Adam([drawn], 0.05)
    for _ in range(60):
        loss = pictures.structure_loss(source, drawn)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0] and 0 <= losses[-1] <= losses[0] <= 1
    assert pictures.structure_loss(source, -source) < 0.01, "polarity is free"
