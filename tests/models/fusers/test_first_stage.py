"""Stage I: its parts' sizes, and attention that does not know the picture's size."""

from __future__ import annotations

import pytest
import torch

from models.fusers.anchors import ANCHORS
from models.fusers.colour import luminance
from models.fusers.first_stage import Block, ChannelAttention, FirstStage, MultiScale, before_tanh


def test_the_released_multi_scale_block_has_the_released_size():
    assert sum(p.numel() for p in MultiScale(1, 32, "released").parameters()) == 7265
    x = torch.rand(1, 1, 9, 11)
    out = MultiScale(1, 32, "released")(x)
    assert ((out - x) > 0).all() and ((out - x) < 1).all(), "it adds the weights themselves"


def test_the_other_one_adds_what_it_found():
    torch.manual_seed(0)
    block = MultiScale(8, 4)
    x = torch.randn(2, 8, 9, 11)
    assert block(x).shape == x.shape
    torch.nn.init.zeros_(block.leave.weight), torch.nn.init.zeros_(block.leave.bias)
    assert torch.equal(block(x), x)


def test_channel_attention_is_the_equations_on_one_head():
    torch.manual_seed(0)
    net = ChannelAttention(4, 1).double()
    x, other = torch.randn(2, 1, 4, 5, 6).double()
    query = net.queries(x).flatten(2)[0]
    key, value = net.keys_values(other).flatten(2)[0].chunk(2)
    cosine = (query / query.norm(dim=1, keepdim=True)) @ (key / key.norm(dim=1, keepdim=True)).T
    out = (cosine * net.temperature.item()).softmax(1) @ value
    torch.testing.assert_close(net(x, other), net.leave(out.view(1, 4, 5, 6)), atol=1e-5, rtol=1e-4)


def test_a_larger_picture_of_the_same_is_treated_the_same():
    torch.manual_seed(0)
    block = Block(8, 2)
    for part in (block.attention.queries, block.attention.keys_values, block.enter):
        torch.nn.init.zeros_(part[1].weight)
        part[1].weight.data[:, :, 1, 1] = 1  # no neighbours: tiles have other ones at their edges
    x, other = torch.randn(2, 1, 8, 6, 6)
    once = block(x, other)
    tiled = block(x.repeat(1, 1, 2, 2), other.repeat(1, 1, 2, 2))
    torch.testing.assert_close(tiled[..., :6, :6], once, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(block(x), once, atol=1e-3), "the other picture matters"


@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_starts_as_a_blend_and_learns(fold, channels):
    torch.manual_seed(0)
    stage = FirstStage(8, 2, (1, 1), fold, channels)
    infrared, visible = torch.rand(2, 1, 12, 16) * 1.8 - 0.9, torch.rand(2, 3, 12, 16) * 1.8 - 0.9
    base = visible if channels == 3 else luminance(visible)
    first = stage(infrared, visible, base)
    torch.testing.assert_close(first, ((infrared + base) / 2).expand_as(base), atol=1e-4, rtol=0)
    first.square().sum().backward()
    assert stage.leave.weight.grad.abs().sum() > 0 and stage.share.grad.abs() > 0


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_it_may_start_from_an_anchor(channels, anchor):
    stage = FirstStage(8, 2, (1, 1), 1, channels, anchor)
    infrared, visible = torch.rand(2, 1, 12, 16) * 1.8 - 0.9, torch.rand(2, 3, 12, 16) * 1.8 - 0.9
    base = visible if channels == 3 else luminance(visible)
    torch.testing.assert_close(stage(infrared, visible, base), ANCHORS[anchor](infrared.expand_as(base), base))


def test_before_tanh_is_undone_by_tanh():
    picture = torch.linspace(-1, 1, 21)
    torch.testing.assert_close(before_tanh(picture).tanh(), picture, atol=2e-3, rtol=0)
    assert before_tanh(picture.bfloat16()).dtype == torch.bfloat16
