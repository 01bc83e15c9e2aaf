"""MSANet against its equations (GenFusion spec §3.3): loops for the similarities, and what each switch changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from models.backbone import Features, Wants
from models.errors import UsageError
from models.segmenters.msanet import Attention, MSANet, MSANetSettings, ShotWeights, prototypes
from models.segmenters.prototype import Prototype
from models.segmenters.similarity import (
    EPSILON,
    SoftMask,
    multi_similarity,
    object_places,
    prior_maps,
    prototype,
    soft_mask,
    style_discrepancy,
    to_grid,
)

CHANNELS, BLOCKS, GRID = (4, 6, 8), (5, 3, 7), (6, 9)
SETTINGS = MSANetSettings(width=8, similarity_width=6, rates=(1, 2))
FORMS = [
    SETTINGS, replace(SETTINGS, prior="masked_l3"), replace(SETTINGS, gam_pool="all"),
    replace(SETTINGS, multi_sim=False, gam=False), replace(SETTINGS, multi_sim=False, prior="masked_l3"),
]  # fmt: skip


def levels(*lead, seed=0, grid=GRID):
    """Features of a ReLU, block cells, and a fifth level for supports."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(*lead, c, *grid, generator=generator).relu() for c in (*CHANNELS, CHANNELS[2])]
    cells = [torch.randn(*lead, grid[0] * grid[1], c, generator=generator) for c in BLOCKS]
    blocks = torch.cat([normalize(x, dim=-1) for x in cells], -1)
    return Features(*maps[:3], blocks, *([maps[3]] if len(lead) > 1 else []))


def masks(batch=2, shots=2):
    """[B, K, 48, 72]: an object somewhere else in each shot, half filling some cells; ignored pixels at the right."""
    mask = torch.zeros(batch, shots, 48, 72, dtype=torch.uint8)
    for b in range(batch):
        for k in range(shots):
            mask[b, k, 8 + 4 * b : 28 + 4 * b, 16 + 8 * k : 36 + 12 * k] = 1
    mask[..., 66:] = 255
    return mask


def episode(shots=2, batch=2):
    mask = soft_mask(masks(batch, shots), GRID)
    return levels(batch), levels(batch, shots, seed=5), mask, torch.zeros(batch, 1, *GRID)


def learner(settings=SETTINGS, shots=1):
    """With weights large enough that what comes in shows in what goes out."""
    torch.manual_seed(3)
    model = MSANet(CHANNELS, settings, BLOCKS if settings.multi_sim else (), shots)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6**0.5
    return model


def of_supports(support, mask, change):
    return Features(*(change(x) for x in support)), SoftMask(*(change(x) for x in mask))


# ---- similarities


def test_multi_similarity_equals_loops():
    """Cells marked at least as much as marked cells are on average; the mean of ReLU(cosine); the mean over shots."""
    query, support, mask, _ = episode(shots=3)
    found = multi_similarity(query.blocks, support.blocks, BLOCKS, object_places(mask.foreground))
    assert found.shape == (2, 3, 54)
    for b in range(2):
        for n, (start, end) in enumerate(pairwise(np.cumsum((0, *BLOCKS)))):
            expected = np.zeros(54)
            for k in range(3):
                share = mask.foreground[b, k].flatten().numpy()
                taken = [p for p in range(54) if share[p] >= share[share > 0].mean()]
                shown = support.blocks[b, k, taken, start:end].numpy()
                expected += [np.maximum(shown @ q, 0).mean() / 3 for q in query.blocks[b, :, start:end].numpy()]
            assert np.allclose(found[b, n].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shots", [1, 3])
def test_the_prior_of_object_cells_equals_the_full_one(shots):
    """As released: background cells are multiplied by 0, and the maximum runs over all of them."""
    query, support, mask, _ = episode(shots)
    found = prior_maps(query.high, support.high, object_places(mask.foreground))
    for b in range(2):
        for k in range(shots):
            shown = normalize(support.high[b, k] * mask.foreground[b, k], dim=0).flatten(1)
            best = (normalize(query.high[b], dim=0).flatten(1).T @ shown).amax(1)
            expected = (best - best.min()) / (best.max() - best.min() + 1e-7)
            assert torch.allclose(found[b, k].flatten(), expected, atol=1e-5)
    assert found.amax((2, 3)).allclose(torch.ones(2, shots)) and found.min() == 0


def test_prototypes_of_a_constant_are_that_constant():
    constant, weight = torch.randn(2, 1, 8, 1, 1), soft_mask(masks(), GRID).foreground
    total = weight.sum((2, 3))[..., None]
    found = prototypes(constant.expand(-1, 2, -1, *GRID), weight)
    assert torch.allclose(found, constant[..., 0, 0] * total / (total + EPSILON), atol=1e-6)


@pytest.mark.parametrize("pool", ["all", "area"])
def test_attention_as_written(pool):
    """`all` divides by all cells, so that an object of a hundredth of the picture has a hundredth of a say."""
    support, weight = torch.randn(2, 3, 8, *GRID), soft_mask(masks(2, 3), GRID).foreground
    attention = Attention(8, pool, 0.5).eval()
    first, _, second, _, _ = attention.gate
    expected = torch.zeros(2, 8, *GRID)
    for b in range(2):
        for k in range(3):
            masked = (support[b, k] * weight[b, k]).sum((1, 2))
            pooled = masked / (54 if pool == "all" else weight[b, k].sum() + EPSILON)
            gate = torch.sigmoid(second.weight @ (first.weight @ pooled).relu())
            expected[b] += gate[:, None, None] * support[b, k] / 3
    assert torch.allclose(attention(support, weight), expected, atol=1e-5)


# ---- shots


def test_shot_weights_follow_their_shots():
    torch.manual_seed(0)
    weigh, psi = ShotWeights(4), torch.rand(3, 4)
    weights = weigh(psi)
    assert torch.allclose(weights.sum(1), torch.ones(3)) and weights.std(1).min() > 1e-3
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        assert torch.allclose(weigh(psi[:, order]), weights[:, order])
    rising = psi[0].sort().values
    assert torch.allclose(weigh(rising[None])[0], weigh.layers(rising).softmax(0))


def test_one_shot_needs_no_weights_and_another_k_weighs_alike():
    assert not list(ShotWeights(1).parameters())
    assert ShotWeights(1)(torch.rand(2, 1)).eq(1).all() and ShotWeights(5)(torch.rand(2, 2)).eq(0.5).all()


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_the_order_of_supports_changes_nothing(settings):
    query, support, mask, base = episode(shots=3)
    model, order = learner(settings, shots=3).eval(), [2, 0, 1]
    turned = model(query, *of_supports(support, mask, lambda x: x[:, order]), base)
    for found, expected in zip(turned, model(query, support, mask, base), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    other = model(query, *of_supports(support, mask, lambda x: x[:, [0, 0, 1]]), base)
    assert not torch.allclose(other[0], turned[0], atol=1e-3), "the third shot had no say"


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_five_copies_of_a_support_say_what_one_says(settings):
    """Weights of the shots sum to one, so that not even they change anything."""
    query, support, mask, base = episode(shots=1)
    model = learner(settings, shots=5).eval()
    five = model(query, *of_supports(support, mask, lambda x: x.repeat(1, 5, *[1] * (x.dim() - 2))), base)
    for found, expected in zip(five, model(query, support, mask, base), strict=True):
        assert torch.allclose(found, expected, atol=1e-5 if found.shape == (2,) else 1e-3)
    copies = [(k, object_places(mask.foreground.expand(-1, k, -1, -1))) for k in (1, 5)]
    high = [prior_maps(query.high, support.high.expand(-1, k, -1, -1, -1), places) for k, places in copies]
    assert torch.allclose(high[1], high[0].expand_as(high[1]), atol=1e-6)
    similar = [multi_similarity(query.blocks, support.blocks.expand(-1, k, -1, -1), BLOCKS, p) for k, p in copies]
    assert torch.allclose(*similar, atol=1e-6)
    low, share = support.low, mask.foreground
    own = [prototypes(low.expand(-1, k, -1, -1, -1), share.expand(-1, k, -1, -1)) for k in (1, 5)]
    assert torch.allclose(own[1], own[0].expand_as(own[1]), atol=1e-6)


# ---- the learner


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_gradients_reach_every_part(settings):
    model = learner(settings, shots=2)
    target = (torch.rand(2, *GRID, generator=torch.Generator().manual_seed(1)) > 0.5).long()
    logits, psi, control = model(*episode())
    assert logits.shape == control.shape == (2, 2, *GRID) and psi.shape == (2,)
    torch.nn.functional.cross_entropy(logits, target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    idle = {name for name, p in model.named_parameters() if p.grad.abs().sum() == 0}
    assert not idle - {"shots.layers.0.weight", "shots.layers.0.bias", "shots.layers.2.weight"}, "a dead ReLU at most"


def test_it_is_as_large_as_published():
    """5.13 M learnt weights behind a ResNet-50 with its 4 + 6 + 3 blocks (spec §3.3)."""
    model = MSANet((512, 1024, 2048), MSANetSettings(), [1] * 13)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(5.13, abs=0.005)


def test_style_and_control_come_of_the_plain_levels():
    query, support, mask, base = episode()
    model = learner(shots=2).eval()
    _, psi, control = model(query, support, mask, base)
    each = style_discrepancy(query.low, support.low)
    assert torch.allclose(psi, (model.shots(each) * each).sum(1))
    scaled = Prototype()(to_grid(query[:3], GRID), to_grid(support[:3], GRID), mask)
    assert torch.allclose(control, scaled, atol=1e-5) and control.std() > 0.1


def test_the_control_takes_levels_of_any_stride():
    """Unit length comes after stretching, for queries as for supports."""
    query, support, mask, _ = episode()
    query, support = (Features(*(x[..., :: n + 1, :: n + 1] for n, x in enumerate(f[:3]))) for f in (query, support))
    scaled = Prototype()(to_grid(query, GRID), to_grid(support, GRID), mask)
    assert torch.allclose(Prototype()(query, support, mask), scaled, atol=1e-5)


def test_the_shots_weigh_prototype_prior_and_style(monkeypatch):
    """With all weight on one shot, the others' prototype, prior and ψ are gone (similarities and attention average)."""
    query, support, mask, base = episode()
    model = learner(replace(SETTINGS, multi_sim=False, gam=False), shots=2).eval()
    alone = model(query, *of_supports(support, mask, lambda x: x[:, 1:]), base)
    monkeypatch.setattr(model.shots, "forward", lambda psi: torch.tensor([[0.0, 1.0]] * 2))
    for found, expected in zip(model(query, support, mask, base)[:2], alone[:2], strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("changes, level", [({}, 2), ({"prior": "masked_l3"}, 4)])
def test_the_prior_reads_the_level_it_is_told_to(changes, level):
    query, support, mask, base = episode()
    model = learner(replace(SETTINGS, **changes)).eval()
    before = model(query, support, mask, base)[0]
    moved = {place: Features(*(x + (n == place) * x.roll(1, -1) for n, x in enumerate(support))) for place in (2, 4)}
    assert not torch.allclose(model(query, moved[level], mask, base)[0], before)
    assert torch.allclose(model(query, moved[6 - level], mask, base)[0], before, atol=1e-6)


@pytest.mark.parametrize(
    "changes, wants",
    [({}, (True, False)), ({"prior": "masked_l3"}, (True, True)), ({"multi_sim": False}, (False, False))],
)
def test_what_it_wants_of_the_encoder(changes, wants):
    assert MSANet.wants(replace(SETTINGS, **changes)) == Wants(*wants)


@pytest.mark.parametrize("switch", ["prior", "gam_pool"])
def test_an_unknown_switch_lists_the_known_ones(switch):
    with pytest.raises(UsageError, match=rf"There is no {switch} 'x'; choose (masked_l3 or masked_l4|all or area)"):
        MSANetSettings(**{switch: "x"})


@pytest.mark.parametrize("settings", FORMS, ids=str)
@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_mask_of_one_kind_gives_no_nan(settings, value):
    query, support, _, base = episode()
    mask = soft_mask(torch.full((2, 2, 48, 72), value, dtype=torch.uint8), GRID)
    places = object_places(mask.foreground)
    empty = value != 1
    assert (prior_maps(query.high, support.high, places) == 0).all() == empty
    assert (multi_similarity(query.blocks, support.blocks, BLOCKS, places) == 0).all() == empty
    assert (prototype(support.low, mask.foreground) == 0).all() == empty
    model = learner(settings).eval()
    logits, psi, _ = model(query, support, mask, base)
    logits.sum().backward()
    assert logits.isfinite().all() and psi.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_episode_does_not_depend_on_its_neighbours():
    query, support, mask, base = episode()
    mask = SoftMask(*(m * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1) for m in mask))
    model = learner(shots=2).eval()
    together = model(query, support, mask, base)[0]
    for b in range(2):
        one = [Features(*(x[b : b + 1] for x in side)) for side in (query, support)]
        alone = model(*one, SoftMask(*(m[b : b + 1] for m in mask)), base[:1])[0]
        assert torch.allclose(alone[0], together[b], atol=1e-4)


def test_coarser_levels_are_stretched_to_the_finest():
    query, support, mask, base = episode()
    coarse = [Features(s[0], *(x[..., ::2, ::3] for x in s[1:3]), *s[3:]) for s in (query, support)]
    assert learner().eval()(*coarse, mask, base)[0].shape == (2, 2, *GRID)
