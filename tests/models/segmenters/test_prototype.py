"""The training-free control: the class of the nearer prototype, and nothing learnt."""

from __future__ import annotations

import torch

from models.segmenters.prototype import SCALE, Prototype
from models.segmenters.similarity import SoftMask, evidence, normalize


def test_a_cell_takes_the_class_of_the_nearer_prototype():
    """Object cells point one way and the rest another; the query holds them elsewhere, and one cell in between."""
    thing, ground = torch.tensor([1.0, 0.2, 0.0]), torch.tensor([0.0, 0.2, 1.0])
    shown = torch.zeros(1, 1, 4, 4)
    shown[..., :2, :2] = 1
    asked = torch.zeros(4, 4)
    asked[3, 1:] = 1

    def picture(mask):
        share = mask[..., None, :, :]
        return normalize(share * thing[:, None, None] + (1 - share) * ground[:, None, None], dim=-3)

    query, support = picture(asked[None]), picture(shown)
    query[0, :, 0, 0] = normalize(0.6 * thing + 0.4 * ground, dim=0)
    logits = Prototype()([query] * 3, [support] * 3, SoftMask(shown, 1 - shown))
    assert logits.shape == (1, 2, 4, 4)
    asked[0, 0] = 1
    assert torch.equal(logits.argmax(1)[0], asked.long())
    assert 0 < logits[0, 1, 0, 0] - logits[0, 0, 0, 0] < logits[0, 1, 3, 1] - logits[0, 0, 3, 1]
    towards_ground = float(normalize(ground, dim=0) @ normalize(thing, dim=0))
    assert torch.allclose(logits[0, :, 3, 1] / SCALE, torch.tensor([towards_ground, 1.0]))


def test_nothing_is_learnt_and_the_evidence_is_enough():
    generator = torch.Generator().manual_seed(0)
    query = [normalize(torch.randn(2, c, 4, 6, generator=generator), dim=1) for c in (3, 5, 4)]
    support = [normalize(torch.randn(2, 2, c, 4, 6, generator=generator), dim=2) for c in (3, 5, 4)]
    foreground = (torch.rand(2, 2, 4, 6, generator=generator) > 0.7).float()
    mask = SoftMask(foreground, 1 - foreground)
    control = Prototype()
    assert not list(control.parameters()) and not list(control.buffers())
    maps = evidence(query, support, mask)
    assert torch.allclose(control(query, support, mask), control.from_evidence(maps), atol=1e-5)
    assert torch.allclose(control.from_evidence(maps), SCALE * maps[:, [16, 15]]), "all levels, background first"
