"""Colour there and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.fusers.colour import luminance, recolour, to_rgb, to_ycrcb

LEVEL = st.integers(0, 255)


@given(LEVEL, LEVEL, LEVEL)
def test_there_and_back_is_exact_for_every_colour(red, green, blue):
    rgb = torch.tensor([red, green, blue]).view(1, 3, 1, 1) / 255
    ycrcb = to_ycrcb(rgb)
    assert ycrcb.min() > -1e-6 and ycrcb.max() < 1 + 1e-6
    torch.testing.assert_close(to_rgb(ycrcb), rgb, atol=1e-6, rtol=0)
    assert torch.equal((to_rgb(ycrcb) * 255).round(), (rgb * 255).round())


def test_the_weights_are_those_of_the_field():
    primaries = torch.eye(3).view(3, 3, 1, 1)
    torch.testing.assert_close(luminance(primaries).flatten(), torch.tensor([0.299, 0.587, 0.114]))
    torch.testing.assert_close(to_ycrcb(primaries)[0, :, 0, 0], torch.tensor([0.299, 1.0, 0.3313]), atol=1e-4, rtol=0)
    grey = torch.full((1, 3, 2, 2), 0.3)
    torch.testing.assert_close(to_ycrcb(grey)[0, :, 0, 0], torch.tensor([0.3, 0.5, 0.5]))


def test_the_fused_luminance_takes_the_visible_colours():
    visible = 0.3 + 0.4 * torch.rand(2, 3, 5, 7)
    fused = luminance(visible) * 0.9
    out = recolour(fused, visible)
    torch.testing.assert_close(luminance(out), fused, atol=1e-6, rtol=0)
    torch.testing.assert_close(to_ycrcb(out)[:, 1:], to_ycrcb(visible)[:, 1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(recolour(luminance(visible), visible), visible, atol=1e-6, rtol=0)
    assert recolour(torch.ones(2, 1, 5, 7), visible).max() <= 1
