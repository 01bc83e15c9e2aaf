"""The learnt metric: where it starts, what it compares, and what training can do with it."""

from __future__ import annotations

import pytest
import torch

from models.backbone import Features
from models.segmenters.metric import PACE, LearntMetric
from models.segmenters.similarity import evidence, soft_mask, to_grid

CHANNELS, GRID = (4, 6, 8), (8, 12)


@pytest.fixture
def episode():
    """Levels of two queries and two supports each, at three strides, and soft masks."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 12), (4, 6), (2, 3))

    def levels(*lead):
        pairs = zip(CHANNELS, sizes, strict=True)
        return Features(*(torch.randn(*lead, c, *size, generator=generator).relu() + 0.01 for c, size in pairs))

    mask = torch.zeros(2, 2, 64, 96, dtype=torch.uint8)
    mask[:, :, 10:40, 20:70], mask[..., 90:] = 1, 255
    return levels(2), levels(2, 2), soft_mask(mask, GRID)


def metric(width):
    torch.manual_seed(3)
    return LearntMetric(CHANNELS, width)


def test_a_square_projection_starts_as_the_margin_of_prototypes(episode):
    query, support, mask = episode
    maps = evidence(to_grid(query, GRID), to_grid(support, GRID), mask, every_level=False)
    found = metric(8)(*episode)
    assert torch.allclose(found, maps[:, 0] - maps[:, 1], atol=1e-5) and found.shape == (2, *GRID)
    assert not torch.allclose(metric(2)(*episode), found, atol=1e-2), "fewer channels tell less"


def test_all_levels_count_the_same_whatever_their_length(episode):
    query, support, mask = episode
    longer = [Features(*(x * length for x, length in zip(f, (100, 1, 0.01), strict=True))) for f in (query, support)]
    assert torch.allclose(metric(5)(*longer, mask), metric(5)(*episode), atol=1e-5)


def test_background_is_compared_as_foreground_is(episode):
    query, support, mask = episode
    assert torch.allclose(metric(5)(query, support, type(mask)(mask.background, mask.foreground)),
                          -metric(5)(*episode), atol=1e-6)  # fmt: skip


def test_it_learns_to_tell_apart_what_features_do_not():
    """A weak channel decides, a strong one misleads; the class of an episode changes, the space serves all."""
    generator = torch.Generator().manual_seed(1)

    def draw(sign):
        object_here = torch.zeros(1, 8, 12)
        object_here[:, 2:6, 3:8] = 1
        strong = 3 * torch.randn(1, 8, 12, generator=generator)
        weak = 0.3 * sign * (2 * object_here - 1)
        level = torch.stack([strong, weak, torch.ones(1, 8, 12)], 1)
        return Features(level, level, level), object_here

    model = LearntMetric((3, 3, 3), 3)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.2)

    def loss(sign):
        (query, here), (support, there) = draw(sign), draw(sign)
        mask = soft_mask(there[:, None].repeat_interleave(8, -1).repeat_interleave(8, -2).to(torch.uint8), GRID)
        support = Features(*(x[None] for x in support))
        return torch.nn.functional.binary_cross_entropy_with_logits(10 * model(query, support, mask), here)

    before = sum(loss(sign).item() for sign in (1, -1) * 8) / 16
    for step in range(300):
        optimiser.zero_grad()
        loss((1, -1)[step % 2]).backward()
        optimiser.step()
    after = sum(loss(sign).item() for sign in (1, -1) * 8) / 16
    assert after < 0.5 * before
    moved = max(float(PACE * m.detach().abs().max()) for m in model.moved)
    assert 0.05 < moved < 3, "one rate serves numbers around 1 and matrices"


def test_the_start_travels_with_the_weights_but_is_not_learnt():
    model = metric(5)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"moved"}
    torch.manual_seed(99)
    other = LearntMetric(CHANNELS, 5)
    assert not torch.equal(other.start0, model.start0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.start0, model.start0)
