"""Filters against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel as scipy_sobel
from scipy.signal import convolve2d

from models.fusers.filters import edges, filter_valid, gaussian_taps, sobel
from tests.models.fusers.reference_metrics import window

PICTURE = np.random.default_rng(0).normal(size=(2, 20, 26))


@pytest.mark.parametrize(("size", "sigma"), [(11, 1.5), (3, 0.6)])
def test_the_gaussian_is_the_two_dimensional_one(size, sigma):
    found = filter_valid(torch.from_numpy(PICTURE), gaussian_taps(size, sigma))
    slow = np.stack([convolve2d(p, window(size, sigma), "valid") for p in PICTURE])
    np.testing.assert_allclose(found.numpy(), slow, atol=1e-12)


@pytest.mark.parametrize(("border", "mode"), [("reflect", "mirror"), ("zero", "constant")])
def test_sobel_borders(border, mode):
    across, down = sobel(torch.from_numpy(PICTURE), border)
    for found, axis in ((across, 1), (down, 0)):
        slow = np.stack([scipy_sobel(p, axis, mode=mode) for p in PICTURE])
        np.testing.assert_allclose(found.numpy(), slow, atol=1e-12)


def test_valid_is_the_inside():
    inside, whole = sobel(torch.from_numpy(PICTURE), "valid"), sobel(torch.from_numpy(PICTURE))
    for a, b in zip(inside, whole, strict=True):
        assert torch.equal(a, b[:, 1:-1, 1:-1])


def test_a_flat_picture_has_no_frame_and_a_gradient_flows():
    flat = torch.full((1, 1, 8, 8), 0.7, requires_grad=True)
    assert edges(flat).abs().max() < 1e-6
    edges(flat * torch.linspace(0, 1, 8)).sum().backward()
    assert flat.grad.abs().sum() > 0
