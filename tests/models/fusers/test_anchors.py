"""Two scales: nothing is lost of one picture, and each place keeps the livelier one's detail."""

from __future__ import annotations

import pytest
import torch

from models.fusers.anchors import blur, two_scale


def textured(left: float, right: float, seed: int) -> torch.Tensor:
    """Noise [1,1,64,160] around 0.5, of one strength to the left and another to the right."""
    noise = torch.randn(1, 1, 64, 160, generator=torch.Generator().manual_seed(seed)) * 0.05
    return 0.5 + noise * torch.cat([torch.full((80,), left), torch.full((80,), right)])


@pytest.mark.parametrize("size", [(64, 160), (5, 7)])
def test_a_picture_with_itself_is_itself(size):
    picture = torch.rand(2, 3, *size)
    torch.testing.assert_close(two_scale(picture, picture), picture)


def test_each_place_keeps_the_detail_of_the_livelier():
    a, b = textured(1.0, 0.1, 0), textured(0.1, 1.0, 1)
    detail = two_scale(a, b) - blur(torch.maximum(a, b), 8.0)
    expected = torch.cat([(a - blur(a, 8.0))[..., :80], (b - blur(b, 8.0))[..., 80:]], 3)
    off_centre = [*range(60), *range(100, 160)]
    torch.testing.assert_close(detail[..., off_centre], expected[..., off_centre])
    assert (detail - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_the_glow_is_the_brighter_one_s():
    dark, light = torch.full((1, 1, 40, 40), 0.2), torch.full((1, 1, 40, 40), 0.7)
    torch.testing.assert_close(two_scale(dark, light), light)
    torch.testing.assert_close(two_scale(light, dark), light)


def test_one_channel_meets_three():
    infrared, visible = torch.rand(2, 1, 32, 40), torch.rand(2, 3, 32, 40)
    torch.testing.assert_close(two_scale(infrared, visible)[:, :1], two_scale(infrared, visible[:, :1]))


def test_a_blur_keeps_the_mean_of_what_is_even_and_spreads_a_point():
    assert torch.allclose(blur(torch.full((1, 1, 9, 9), 0.3), 4.0), torch.tensor(0.3))
    point = torch.zeros(1, 1, 61, 61)
    point[..., 30, 30] = 1
    seen = blur(point, 4.0)
    assert seen.sum().item() == pytest.approx(1, rel=1e-3) and seen.max() == seen[..., 30, 30]
    assert seen[0, 0, 30, 34].item() / seen.max().item() == pytest.approx(torch.tensor(-0.5).exp().item(), rel=1e-3)
