"""The table against the sum over all pixels."""

from __future__ import annotations

import numpy as np
import torch

from models.fusers.saliency import saliency, saliency_blend


def slow(picture: np.ndarray) -> np.ndarray:
    """Distance of each pixel to all others, one by one."""
    value = np.array([np.abs(picture.astype(int) - int(p)).sum() for p in picture.ravel()]).reshape(picture.shape)
    return (value - value.min()) / (value.max() - value.min())


def test_the_table_equals_brute_force():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64), dtype=np.uint8)
    pictures[1] //= 3
    found = saliency(torch.from_numpy(pictures)[:, None] / 255)
    for one, picture in zip(found[:, 0], pictures, strict=True):
        np.testing.assert_allclose(one.numpy(), slow(picture), atol=1e-5)


def test_a_constant_picture_has_no_saliency_and_equal_weights():
    flat, other = torch.full((1, 1, 8, 8), 0.4), torch.full((1, 1, 8, 8), 0.8)
    assert torch.equal(saliency(flat), torch.zeros_like(flat))
    torch.testing.assert_close(saliency_blend(flat, other), torch.full_like(flat, 0.6))


def test_what_is_rare_comes_through():
    infrared, visible = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.5)
    infrared[..., :4, :4] = 0.9
    visible[..., 10:, 10:] = 0.1
    blend = saliency_blend(infrared, visible)
    torch.testing.assert_close(blend[..., 0, 0], torch.tensor([[0.9]]))
    torch.testing.assert_close(blend[..., 15, 15], torch.tensor([[0.1]]))
    torch.testing.assert_close(blend[..., 8, 4], torch.tensor([[0.35]]))
