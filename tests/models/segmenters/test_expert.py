"""One fold's model: strides join, the base learner is frozen and leaves out what training asks about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.backbone import Features
from models.errors import UsageError
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.pspnet import base_map

CHANNELS, GRID, BASE = (4, 6, 8), (8, 12), (3, 5, 7)
SETTINGS = ExpertSettings(base_width=16, anchored=AnchoredSettings(width=4))


def make(settings=SETTINGS, streams=2):
    torch.manual_seed(0)
    return Expert(CHANNELS, BASE, streams, settings)


def levels(*lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (GRID, (4, 6), (2, 3))
    return Features(*(torch.randn(*lead, c, *s, generator=generator) for c, s in zip(CHANNELS, sides, strict=True)))


@pytest.fixture(scope="module")
def episode():
    """Two episodes of three shots in two streams, at the encoder's own strides."""
    masks = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    masks[..., 10:40, 20:70] = 1
    return [levels(2), levels(2, seed=1)], [levels(2, 3, seed=2), levels(2, 3, seed=3)], masks


def test_an_unknown_fusion_lists_the_known_ones():
    with pytest.raises(UsageError, match="no fusion 'F3'; choose F1 or F2"):
        ExpertSettings(fusion="F3")


@pytest.mark.parametrize("form", ["F1", "F2"])
def test_native_strides_join_the_finest_grid(episode, form):
    out = make(replace(SETTINGS, fusion=form))(*episode)
    assert out.final.shape == (2, 2, *GRID) and out.streams.shape == (2, 2, 2, *GRID) and out.psi.shape == (2, 2)


def test_an_episode_does_not_depend_on_its_neighbours(episode):
    query, support, masks = episode
    model = make().eval()
    both = model(*episode).final
    for b in range(2):
        one = [[Features(*(x[b : b + 1] for x in stream)) for stream in side] for side in (query, support)]
        assert torch.allclose(model(*one, masks[b : b + 1]).final[0], both[b], atol=1e-5)


def test_the_base_map_is_that_of_the_first_stream_and_leaves_out_the_own_class(episode):
    model, (query, support, masks) = make().eval(), episode
    own = torch.tensor([2, 0])
    logits = model.base(query[0], GRID)
    for given in (None, own):
        share = base_map(logits, given)
        assert torch.equal(model.base_share(query[0], GRID, given), share)
        out = model(query, support, masks, given)
        assert torch.equal(out.final, model.ensemble.fusion(out.streams, out.psi, share))
        assert torch.equal(out.final, model(query, support, masks, given, logits).final), "known logits are asked again"
    assert not torch.equal(model(query, support, masks).final[0], model(query, support, masks, own).final[0])


def test_without_the_base_map_the_base_learner_has_no_say(episode):
    model = make(replace(SETTINGS, use_base=False))
    before = model(*episode).final
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.normal_()
    assert torch.equal(model(*episode).final, before)
    assert torch.equal(model.base_share(episode[0][0], GRID), torch.zeros(2, 1, *GRID))


def test_the_base_learner_stays_frozen_in_training(episode):
    model = make().train()
    before = {name: x.clone() for name, x in model.base.state_dict().items()}
    model(*episode).final.sum().backward()
    assert all(torch.equal(x, before[name]) for name, x in model.base.state_dict().items()), "statistics moved"
    assert all(p.grad is None for p in model.base.parameters())
    assert any(p.grad is not None for p in model.ensemble.parameters())


def test_where_a_class_stands_among_the_base_classes():
    assert make().own_index([5, 9, 3, 7]).tolist() == [2, 0, 1, 3]
