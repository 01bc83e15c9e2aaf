"""The base learner's head, and the map of "some other object" that is made of it."""

from __future__ import annotations

import pytest
import torch

from models.backbone import Features
from models.segmenters.pspnet import PSPNet, base_map

CHANNELS = (4, 6, 8)


def features(batch=2, sides=((8, 12), (4, 6), (2, 3))):
    generator = torch.Generator().manual_seed(0)
    return Features(*(torch.randn(batch, c, *s, generator=generator) for c, s in zip(CHANNELS, sides, strict=True)))


@pytest.fixture
def head():
    torch.manual_seed(0)
    return PSPNet(CHANNELS, classes=3, width=16)


@pytest.mark.parametrize("sides", [((8, 12), (4, 6), (2, 3)), ((8, 12),) * 3])
def test_logits_lie_on_the_grid_whatever_the_strides(head, sides):
    assert head(features(2, sides), (8, 12)).shape == (2, 4, 8, 12)


def test_in_evaluation_a_picture_does_not_depend_on_its_neighbours(head):
    levels = features(3)
    head(levels, (8, 12))  # moves the statistics away from their start
    together = head.eval()(levels, (8, 12))
    for n in range(3):
        alone = head(Features(*(level[n : n + 1] for level in levels)), (8, 12))
        assert torch.allclose(together[n], alone[0], atol=1e-5)


def test_what_is_far_away_reaches_a_cell_through_the_pyramid(head):
    """Pooled over 1 x 1 and 2 x 2 regions, a corner hears of the opposite one, which a 3 x 3 kernel cannot."""
    levels = features(2, ((8, 12),) * 3)
    moved = Features(levels.low, levels.mid, levels.high.clone())
    moved.high[:, :, -1, -1] += 50
    head.eval()
    assert (head(moved, (8, 12)) - head(levels, (8, 12)))[:, :, 0, 0].abs().max() > 1e-3
    low = Features(levels.low + 1, *levels[1:])
    assert torch.equal(head(low, (8, 12)), head(levels, (8, 12))), "the low level has no say"


def test_every_weight_learns(head):
    head(features(), (8, 12)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


# ---- P_b


@pytest.fixture
def logits():
    return torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(1))


def test_the_base_map_sums_base_classes_without_background(logits):
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    found = base_map(logits)
    assert found.shape == (3, 1, 2, 5)
    assert torch.allclose(found[:, 0], shares[:, 1] + shares[:, 2] + shares[:, 3])
    assert torch.allclose(found[:, 0], 1 - shares[:, 0])


def test_the_class_of_each_episode_is_left_out(logits):
    shares = logits.softmax(1)
    found = base_map(logits, torch.tensor([2, 0, 3]))[:, 0]
    assert torch.allclose(found[0], shares[0, 1] + shares[0, 3])
    assert torch.allclose(found[1], shares[1, 1:].sum(0)), "0 leaves none out, not the background"
    assert torch.allclose(found[2], shares[2, 1] + shares[2, 2])
