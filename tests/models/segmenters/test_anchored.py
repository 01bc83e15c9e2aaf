"""The anchored learner: it starts as the control, and every part of it can learn."""

from __future__ import annotations

import pytest
import torch

from models.backbone import Features
from models.errors import UsageError
from models.segmenters.anchored import Anchored, AnchoredSettings
from models.segmenters.prototype import SCALE, Prototype
from models.segmenters.similarity import SoftMask, evidence, soft_mask, style_discrepancy, to_grid

CHANNELS, GRID = (4, 6, 8), (8, 12)
FORMS = [AnchoredSettings(width=8, correction=c, raw_width=r) for c, r in ((True, 0), (True, 8), (False, 0))]
FORMS += [AnchoredSettings(correction=False, metric=5), AnchoredSettings(width=8, raw_width=8, metric=5)]


@pytest.fixture(scope="module")
def episode():
    """Query and support levels of two episodes of two shots, soft masks, a base map."""
    generator = torch.Generator().manual_seed(0)

    def levels(*lead):
        return Features(*(torch.randn(*lead, c, *GRID, generator=generator).relu() + 0.01 for c in CHANNELS))

    mask = torch.zeros(2, 2, 64, 96, dtype=torch.uint8)
    mask[:, :, 10:40, 20:70], mask[..., 90:] = 1, 255
    base = torch.rand(2, 1, *GRID, generator=generator)
    return levels(2), levels(2, 2), soft_mask(mask, GRID), base


def learner(settings):
    torch.manual_seed(3)
    return Anchored(CHANNELS, settings)


def unit(episode):
    """The levels as `evidence` wants them, and the masks."""
    return to_grid(episode[0], GRID), to_grid(episode[1], GRID), episode[2]


def margin(logits):
    return logits[:, 1] - logits[:, 0]


@pytest.mark.parametrize("settings", FORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_it_starts_as_the_control(episode, settings, training):
    logits, psi, control = learner(settings).train(training)(*episode)
    assert torch.allclose(control, Prototype()(*unit(episode)), atol=1e-5)
    assert torch.allclose(margin(logits), margin(control), atol=1e-5)
    assert torch.equal(logits.argmax(1), control.argmax(1))
    query, support, _ = unit(episode)
    assert torch.allclose(psi, style_discrepancy(query[0], support[0]).mean(1)) and psi.shape == (2,)


def test_the_anchor_weighs_two_margins_and_a_threshold(episode):
    model, maps = learner(FORMS[2]), evidence(*unit(episode))
    with torch.no_grad():
        model.mix.copy_(torch.tensor([0.3, 0.6]))
        model.threshold.fill_(0.5)
    expected = SCALE * (0.3 * (maps[:, 15] - maps[:, 16]) + 0.6 * (maps[:, 17] - maps[:, 18]) - 0.05)
    assert torch.allclose(margin(model(*episode)[0]), expected, atol=1e-5)


def test_without_correction_three_numbers_are_all_there_is():
    assert sorted(name for name, _ in learner(FORMS[2]).named_parameters()) == ["mix", "threshold"]


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_gradients_reach_every_part(episode, settings):
    """Correction and metric weigh nothing at the start, so what is inside learns from the second step on."""
    model = learner(settings).eval()
    target = (torch.rand(2, *GRID, generator=torch.Generator().manual_seed(1)) > 0.5).long()
    for _ in range(2):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(*episode)[0], target).backward()
        assert model.mix.grad.abs().min() > 0 and model.threshold.grad.abs() > 0
        if settings.correction:
            assert model.correct.out.weight.grad.abs().sum() > 0
        if settings.metric:
            assert model.trust.grad.abs() > 0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name == "trust" or name.startswith("correct.out"):
                    parameter -= 0.1 * parameter.grad
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learnt == {name for name, _ in model.named_parameters()}


def test_raw_features_without_correction_are_refused():
    with pytest.raises(UsageError, match=r"Only the correction reads raw features; set correction=true or raw_width=0"):
        AnchoredSettings(raw_width=8, correction=False)


def test_dropout_takes_whole_maps_in_training_alone(episode):
    model = learner(AnchoredSettings(width=8, dropout=0.5))
    torch.nn.init.normal_(model.correct.out.weight)
    assert not torch.equal(model.train()(*episode)[0], model(*episode)[0])
    assert torch.equal(model.eval()(*episode)[0], model(*episode)[0])


def test_the_base_map_and_the_raw_features_inform_the_correction(episode):
    query, support, mask, base = episode
    model = learner(FORMS[1]).eval()
    torch.nn.init.normal_(model.correct.out.weight)
    before = model(query, support, mask, base)[0]
    assert not torch.allclose(model(query, support, mask, 1 - base)[0], before)
    torch.nn.init.zeros_(model.reduce.weight)
    assert not torch.allclose(model(query, support, mask, base)[0], before)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_the_order_of_supports_changes_nothing(episode, settings):
    query, support, mask, base = episode
    model = learner(settings).eval()
    if settings.correction:
        torch.nn.init.normal_(model.correct.out.weight)
    if settings.metric:
        model.trust.data.fill_(1.0)
    turned = model(query, Features(*(x.flip(1) for x in support)), SoftMask(*(m.flip(1) for m in mask)), base)
    for found, expected in zip(turned, model(*episode), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_mask_of_one_kind_gives_no_nan(episode, value):
    query, support, _, base = episode
    mask = soft_mask(torch.full((2, 2, 64, 96), value, dtype=torch.uint8), GRID)
    model = learner(FORMS[4]).eval()
    torch.nn.init.normal_(model.correct.out.weight)
    model.trust.data.fill_(1.0)
    logits, psi, _ = model(query, support, mask, base)
    logits.sum().backward()
    assert logits.isfinite().all() and psi.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
