"""The released sizes, any fold, and semantics that come late."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models.fusers.anchors import ANCHORS
from models.fusers.fusion_net import DenseBlock, FusionNet


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def net(**changes) -> FusionNet:
    torch.manual_seed(0)
    return FusionNet(**{"width": 8, "growth": 4, "heads": 2, "semantic": (6, 10), **changes})


def inputs(side: int = 16) -> tuple:
    torch.manual_seed(1)
    semantics = [torch.randn(2, 6, side // 4, side // 4), torch.randn(2, 10, side // 8, side // 8)]
    return *torch.rand(2, 2, 1, side, side), semantics


def test_the_released_form_has_the_released_size():
    with torch.device("meta"):
        whole = FusionNet(norm="sum", native=False)
        block = DenseBlock(64, 32)
    assert count(whole) == pytest.approx(0.968e6, abs=1000)
    assert count(whole) + count(whole.attention) == pytest.approx(1.034e6, abs=1000), "with the module it never calls"
    assert count(block) == pytest.approx(0.1989e6, abs=100)


@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("native", [True, False])
def test_every_form_draws_the_size_it_was_given(fold, native):
    infrared, visible, semantics = inputs()
    drawn = net(fold=fold, native=native)(infrared, visible, semantics)
    assert drawn.shape == (2, 1, 16, 16) and torch.isfinite(drawn).all()


def test_the_convolution_commutes_with_the_upsampling():
    module = net(native=False)
    _, _, semantics = inputs(32)
    like = torch.zeros(2, 8, 32, 32)
    up = F.interpolate(semantics[0], (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(module._semantic(0, semantics, like), module.enter[0](up), atol=1e-5, rtol=0)


def test_semantics_change_the_picture_and_their_absence_is_learnt():
    infrared, visible, semantics = inputs()
    module = net()
    without = module(infrared, visible)
    assert not torch.allclose(without, module(infrared, visible, semantics))
    without.sum().backward()
    assert module.unknown.grad is not None and module.enter[0].weight.grad is None


def test_an_anchored_start_is_what_the_anchor_says_of_the_pair():
    infrared, visible, semantics = inputs()
    assert torch.equal(net(anchor="mean", fold=2)(infrared, visible, semantics), (infrared + visible) / 2)
    for name, rule in ANCHORS.items():
        assert torch.equal(net(anchor=name)(infrared, visible, semantics), rule(infrared, visible)), name


def test_swapping_the_pair_matters():
    infrared, visible, semantics = inputs()
    module = net()
    assert not torch.allclose(module(infrared, visible, semantics), module(visible, infrared, semantics))
