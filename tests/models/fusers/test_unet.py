"""The U-Net's and HFAH's sizes, and that the noise level matters."""

from __future__ import annotations

import pytest
import torch

from models.fusers.unet import AggregationHead, Gate, NoiseLevel, PlainHead, UNet


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_reference_has_the_measured_size():
    with torch.device("meta"):
        unet = UNet(5)
        assert count(unet, PlainHead(unet.channels, 3)) == pytest.approx(55.4e6, abs=0.1e6)
        assert count(AggregationHead(unet.channels, 3, "channel")) == pytest.approx(0.272e6, abs=1e3)


def test_it_returns_every_level_of_the_decoder():
    with torch.device("meta"):
        maps = UNet(5)(torch.empty(2, 5, 160, 160), torch.empty(2))
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 160, 160), (128, 80, 80), (256, 40, 40), (512, 20, 20)]


def tiny(**changes) -> UNet:
    torch.manual_seed(0)
    return UNet(**{"source": 3, "base": 8, "mults": (1, 2, 3), "blocks": 1, **changes}).eval()


@pytest.mark.parametrize("attention", [True, False])
def test_each_image_has_its_own_noise_level(attention):
    unet, x = tiny(attention=attention), torch.randn(1, 3, 16, 24)
    maps = unet(x.expand(2, -1, -1, -1), torch.tensor([0.2, 0.9]))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 24, 4, 6)]
    assert not torch.allclose(maps[0][0], maps[0][1], atol=1e-3)
    alone = unet(x, torch.tensor([0.9]))
    torch.testing.assert_close(maps[0][1:], alone[0], atol=1e-4, rtol=1e-4)


def test_levels_that_lie_close_are_told_apart():
    embed = NoiseLevel(16)
    near = embed(torch.tensor([0.5, 0.51]))
    assert (near[0] - near[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["channel", "spatial", "cbam"])
def test_gates_weigh_channels_pixels_or_both(kind):
    torch.manual_seed(0)
    gate, x = Gate(64, kind), torch.rand(1, 64, 6, 7) + 0.1
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.abs_()  # or a hidden unit may be dead
    ratio = gate(x) / x
    assert ((ratio > 0) & (ratio < 1)).all()
    over_space, over_channels = ratio.std((2, 3)).max() > 1e-4, ratio.std(1).max() > 1e-4
    assert (bool(over_channels), bool(over_space)) == (kind != "spatial", kind != "channel")


def test_the_head_listens_to_every_level():
    torch.manual_seed(0)
    head = AggregationHead((8, 16), 3)
    maps = [torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)]
    told = head(maps)
    assert told.shape == (1, 3, 8, 8)
    for changed in ([maps[0] + 1, maps[1]], [maps[0], maps[1] + 1]):
        assert not torch.allclose(head(changed), told)
