"""F1 and F2 against their equations, and what each is at the start (GenFusion spec §4, §10 test 8)."""

from __future__ import annotations

import math

import pytest
import torch

from models.backbone import Features
from models.segmenters.anchored import Anchored, AnchoredSettings
from models.segmenters.fusion import TINY, FusionEnsemble, GatedFusion, LinearFusion
from models.segmenters.similarity import SoftMask

GRID = (3, 4)
FUSIONS = [LinearFusion, GatedFusion]


def inputs(streams=2, batch=2):
    """Logits [B, V, 2, h, w], ψ [B, V], base map [B, 1, h, w]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, streams, 2, *GRID, generator=generator)
    return logits, torch.rand(batch, streams, generator=generator), torch.rand(batch, 1, *GRID, generator=generator)


# ---- F1


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_f1_starts_as_the_mean_of_the_probability_maps(streams):
    logits, psi, base = inputs(streams)
    assert torch.allclose(LinearFusion(streams)(logits, psi, base), logits.softmax(2).mean(1), atol=1e-6)


def test_f1_of_one_stream_is_bam():
    """F(x) = w1·x + w2·ψ; p_f^1 = F(p^1), p_f^0 = v1·F(p^0) + v2·P_b (BAM eq. 9-12; spec §3.4)."""
    logits, psi, base = inputs(1)
    fusion = LinearFusion(1)
    w1, w2, v1, v2 = 1.7, -0.4, 0.8, 0.6
    with torch.no_grad():
        fusion.share.fill_(w1), fusion.style.fill_(w2), fusion.background.copy_(torch.tensor([v1, v2]))
    final = fusion(logits, psi, base)
    for b in range(2):
        background, foreground = (w1 * p + w2 * psi[b, 0] for p in logits[b, 0].softmax(0))
        assert torch.allclose(final[b, 1], foreground, atol=1e-6)
        assert torch.allclose(final[b, 0], v1 * background + v2 * base[b, 0], atol=1e-6)


def test_f1_of_two_streams_as_written():
    logits, psi, base = inputs(2)
    fusion = LinearFusion(2)
    with torch.no_grad():
        fusion.share.copy_(torch.tensor([0.9, 0.2])), fusion.style.copy_(torch.tensor([0.3, -0.7]))
        fusion.background.copy_(torch.tensor([0.5, 0.25]))
    p = logits.softmax(2)
    style = (0.3 * psi[:, 0] - 0.7 * psi[:, 1]).view(2, 1, 1)
    a = [0.9 * p[:, 0, c] + 0.2 * p[:, 1, c] + style for c in (0, 1)]
    expected = torch.stack([0.5 * a[0] + 0.25 * base[:, 0], a[1]], 1)
    assert torch.allclose(fusion(logits, psi, base), expected, atol=1e-6)


# ---- F2


def test_f2_of_one_stream_without_base_is_that_stream():
    logits, psi, base = inputs(1)
    final = GatedFusion(1, gamma=1e-30)(logits, psi, base)
    assert torch.allclose(final, logits[:, 0].log_softmax(1), atol=1e-5)
    assert torch.equal(final.argmax(1), logits[:, 0].argmax(1))


def test_f2_starts_as_the_geometric_mean():
    logits, psi, base = inputs(3)
    final = GatedFusion(3, gamma=1e-30)(logits, psi, base)
    assert torch.allclose(final.exp(), logits.softmax(2).prod(1) ** (1 / 3), atol=1e-6)


def test_f2_as_written():
    logits, psi, base = inputs(2)
    fusion = GatedFusion(2, gamma=0.2)
    with torch.no_grad():
        fusion.bias.copy_(torch.tensor([0.4, -0.3])), fusion.entropy.fill_(1.5), fusion.style.fill_(0.8)
        fusion.temperature.fill_(math.log(1.3))
    final = fusion(logits, psi, base)
    for b in range(2):
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                shares = [logits[b, v, :, y, x].softmax(0).tolist() for v in range(2)]
                raw = [
                    bias - 1.5 * -sum(p * math.log(p) for p in share) - 0.8 * psi[b, v].item()
                    for v, (bias, share) in enumerate(zip((0.4, -0.3), shares, strict=True))
                ]
                gate = [math.exp(r) / sum(map(math.exp, raw)) for r in raw]
                level = [1.3 * sum(g * math.log(p[c]) for g, p in zip(gate, shares, strict=True)) for c in (0, 1)]
                objects = 0.2 * (base[b, 0, y, x].item() + TINY)
                expected = [math.log(math.exp(level[0]) + objects), level[1]]
                assert final[b, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_f2_takes_other_objects_for_background():
    logits, psi, _ = inputs(2)
    fusion = GatedFusion(2)
    shares = [fusion(logits, psi, torch.full((2, 1, *GRID), p)).softmax(1)[:, 1] for p in (0.0, 0.5, 1.0)]
    assert (shares[0] > shares[1]).all() and (shares[1] > shares[2]).all()
    without = GatedFusion(2, gamma=1e-30)(logits, psi, torch.ones(2, 1, *GRID)).softmax(1)[:, 1]
    assert torch.allclose(shares[0], without, atol=1e-5)


def test_f2_starts_at_the_weight_it_is_given():
    assert torch.nn.functional.softplus(GatedFusion(2, gamma=0.3).gamma).item() == pytest.approx(0.3)


def test_f2_gates_by_entropy_and_by_style():
    """With a > 0 the surer stream counts more, with d > 0 the one whose support looks like the query."""
    logits = torch.tensor([[8.0, -8.0], [-0.5, 0.5]]).view(1, 2, 2, 1, 1).expand(1, 2, 2, *GRID)
    base = torch.zeros(1, 1, *GRID)
    fusion = GatedFusion(2, gamma=1e-30)
    equal = fusion(logits, torch.tensor([[0.3, 0.3]]), base)[:, 1]
    with torch.no_grad():
        fusion.entropy.fill_(5.0)
    assert (fusion(logits, torch.tensor([[0.3, 0.3]]), base)[:, 1] < equal).all(), "the sure one says background"
    with torch.no_grad():
        fusion.entropy.fill_(0.0), fusion.style.fill_(5.0)
    assert (fusion(logits, torch.tensor([[0.9, 0.1]]), base)[:, 1] > equal).all(), "the alike one says foreground"


# ---- both


@pytest.mark.parametrize("fusion", FUSIONS)
def test_equal_streams_say_what_one_says(fusion):
    logits, psi, base = inputs(1)
    three = fusion(3)(logits.expand(-1, 3, -1, -1, -1), psi.expand(-1, 3), base)
    assert torch.allclose(three, fusion(1)(logits, psi, base), atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_at_the_start_the_order_of_streams_is_of_no_account(fusion):
    logits, psi, base = inputs(2)
    model = fusion(2)
    assert torch.allclose(model(logits.flip(1), psi.flip(1), base), model(logits, psi, base), atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_certainty_and_empty_base_maps_give_no_nan(fusion):
    logits = torch.tensor([200.0, -200.0]).view(1, 1, 2, 1, 1).expand(1, 2, 2, *GRID).clone().requires_grad_()
    model = fusion(2)
    final = model(logits, torch.zeros(1, 2), torch.zeros(1, 1, *GRID))
    final.sum().backward()
    assert final.isfinite().all() and logits.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("form", ["F1", "F2"])
def test_each_learner_sees_its_own_stream(form):
    generator = torch.Generator().manual_seed(0)
    query, support = (
        [Features(*(torch.randn(*lead, c, *GRID, generator=generator) for c in (4, 6, 8))) for _ in range(2)]
        for lead in ((2,), (2, 3))
    )
    foreground = torch.zeros(2, 3, *GRID)
    foreground[..., 1:3, :2] = 1
    episode = SoftMask(foreground, 1 - foreground), torch.rand(2, 1, *GRID, generator=generator)
    torch.manual_seed(0)
    model = FusionEnsemble([Anchored((4, 6, 8), AnchoredSettings(width=4)) for _ in range(2)], form).eval()
    out = model(query, support, *episode)
    assert out.final.shape == (2, 2, *GRID) and out.streams.shape == (2, 2, 2, *GRID) and out.psi.shape == (2, 2)
    assert torch.equal(out.final, model.fusion(out.streams, out.psi, episode[1]))
    for v, learner in enumerate(model.learners):
        logits, psi, control = learner(query[v], support[v], *episode)
        assert torch.equal(out.streams[:, v], logits) and torch.equal(out.psi[:, v], psi)
        assert torch.equal(out.control[:, v], control)
    out.final.sum().backward()
    assert all(learner.mix.grad.abs().sum() > 0 for learner in model.learners)
    assert isinstance(model.fusion, {"F1": LinearFusion, "F2": GatedFusion}[form])
