"""Channel counts, sizes and batch sizes of the four networks."""

from __future__ import annotations

import pytest
import torch

from models.generators import networks
from models.generators.networks import CycleGenerator, DiffusiveDiscriminator, DiffusiveGenerator, PatchDiscriminator


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 3), (3, 1)])
def test_channels_are_free(source, target):
    x, y, t, z = torch.rand(2, source, 16, 24), torch.rand(2, target, 16, 24), torch.tensor([0, 3]), torch.rand(2, 5)
    generator = DiffusiveGenerator(source, target, (6, 12), layers=1, patch=2, attention=True, latent=5)
    assert generator(y, x, t, z).shape == y.shape
    assert CycleGenerator(source, target, width=4, blocks=1)(x).shape == y.shape
    assert DiffusiveDiscriminator(target, (4, 8), embedding=8)(y, y, t).shape == (2,)
    assert PatchDiscriminator(target, width=4, layers=2)(torch.rand(2, target, 32, 32)).shape == (2, 1, 6, 6)


def test_the_patch_discriminator_judges_70_pixels():
    """70 x 70 in, one logit: at 256 x 256 the usual 30 x 30 of them."""
    with torch.device("meta"):
        assert PatchDiscriminator(1)(torch.zeros(1, 1, 256, 256)).shape == (1, 1, 30, 30)


def test_the_paper_sizes():
    with torch.device("meta"):
        nets = {"cycle": CycleGenerator(1, 1), "judge": DiffusiveDiscriminator(1), "patch": PatchDiscriminator(1)}
    millions = {name: sum(p.numel() for p in net.parameters()) / 1e6 for name, net in nets.items()}
    assert millions["cycle"] == pytest.approx(7.8, abs=1.0)
    assert millions["judge"] == pytest.approx(27.7, rel=0.1)
    assert millions["patch"] == pytest.approx(2.8, abs=0.1)


def test_z_and_t_and_source_all_matter():
    torch.manual_seed(0)
    net = DiffusiveGenerator(1, 1, (8, 8), layers=1, attention=False, latent=4)
    x, source, t, z = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), torch.tensor([1]), torch.randn(1, 4)
    drawn = net(x, source, t, z)
    for other in ((x, source, t + 1, z), (x, source, t, z + 1), (x, source + 1, t, z), (x + 1, source, t, z)):
        assert not torch.allclose(net(*other), drawn, atol=1e-4)


def test_z_is_normalised():
    z = networks.PixelNorm()(torch.randn(3, 50) * 9)
    torch.testing.assert_close(z.square().mean(1), torch.ones(3))


@pytest.mark.parametrize("batch", range(1, 9))
def test_batch_deviation_takes_any_batch(batch):
    h = torch.randn(batch, 3, 2, 2)
    maps = networks.batch_deviation(h)
    assert maps.shape == (batch, 1, 2, 2)
    assert networks.batch_deviation(h[:1].expand(batch, -1, -1, -1)).abs().max() < 1e-3
    if batch == 4:
        expected = h.var(0, unbiased=False).sqrt().mean()
        torch.testing.assert_close(maps, expected.expand_as(maps), atol=1e-4, rtol=0)


def test_blurring_keeps_a_flat_picture():
    block = networks.HalvingBlock(2, 2, 4)
    halved = block._halve(torch.ones(1, 2, 8, 8))
    torch.testing.assert_close(halved[:, :, 1:-1, 1:-1], torch.ones(1, 2, 2, 2))


def test_groups_divide_every_width():
    assert networks._divisor((32, 32, 64), 16) == 16
    assert networks._divisor((24, 36), 16) == 12
    assert networks._divisor((7, 11), 16) == 1
