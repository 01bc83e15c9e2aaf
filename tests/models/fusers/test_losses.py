"""Losses at points whose value is known, and masks that may be empty."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from models.errors import UsageError
from models.fusers.colour import luminance
from models.fusers.filters import edges
from models.fusers.losses import (
    complement_loss,
    masked_losses,
    masked_mean,
    maximum_loss,
    metric_loss,
    own_losses,
    smooth_edge_transfer,
    ssim,
    target_loss,
    warm_up_loss,
)
from models.fusers.metrics import edge_transfer, fusion_metrics, grey8
from models.fusers.settings import FuserSettings
from tests.models.fusers.small import drawn_pairs


def pictures(count: int = 3) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(count, 2, 1, 24, 30)


def test_ssim_is_the_usual_one():
    x, y, _ = pictures()
    _, whole = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
    assert ssim(x, y).item() == pytest.approx(whole[..., 5:-5, 5:-5].mean().item(), abs=1e-5)
    assert ssim(x, x).item() == pytest.approx(1)


def test_a_target_that_is_reached_costs_nothing():
    x, y, _ = pictures()
    for loss in (warm_up_loss, target_loss):
        assert loss(x, x).item() == pytest.approx(0, abs=1e-6)
        assert loss(x, y) > 0.1
    shifted = warm_up_loss(x + 0.25, x)
    assert shifted.item() == pytest.approx(0.25, abs=1e-5), "a constant has no gradient"


def test_the_maximum_is_of_both():
    infrared, visible = torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16)
    infrared[..., :4], visible[..., 10:] = 0.9, 0.6
    best = torch.maximum(infrared, visible)
    assert maximum_loss(best, infrared, visible).item() == pytest.approx(0, abs=1e-5)
    assert maximum_loss(infrared.expand_as(visible), infrared, visible) > 0.2
    flat = torch.full_like(visible, 0.5)
    sharp = torch.maximum(edges(infrared).expand_as(visible), edges(visible)).mean()
    brightest = (flat - best).abs().mean()
    assert maximum_loss(flat, infrared, visible, 7.0).item() == pytest.approx((brightest + 7 * sharp).item(), rel=1e-4)


def test_a_masked_mean_is_over_the_mask_alone():
    values = torch.arange(16.0).view(1, 1, 4, 4).expand(2, 3, -1, -1)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0, :2] = 1
    assert masked_mean(values, mask).tolist() == pytest.approx([0.5, 0], abs=1e-5)
    mask[0] *= 0.5
    assert masked_mean(values, mask)[0].item() == pytest.approx(0.5, abs=1e-5), "soft masks weigh"


@pytest.mark.parametrize("masks", ["empty", "full", "random"])
def test_losses_are_finite_whatever_the_masks(masks):
    estimate, infrared, visible = pictures().requires_grad_()
    first = (infrared + visible) / 2
    torch.manual_seed(1)
    both = {"empty": torch.zeros, "full": torch.ones, "random": torch.rand}[masks](2, 2, 1, 24, 30)
    losses = masked_losses(estimate, first, infrared, visible, *both)
    assert all(value.shape == (2,) and torch.isfinite(value).all() for value in losses.values())
    sum(value.sum() for value in losses.values()).backward()
    if masks == "empty":
        assert losses["intensity"].sum() == losses["gradient"].sum() == 0
        torch.testing.assert_close(losses["background"], (estimate - first).abs().mean((1, 2, 3)))
    if masks == "full":
        assert losses["background"].sum() == 0
        torch.testing.assert_close(losses["intensity"], (estimate - infrared).abs().mean((1, 2, 3)), atol=1e-5, rtol=0)


def test_infrared_has_the_say_where_both_masks_are():
    _, infrared, visible = pictures()
    ones = torch.ones_like(infrared)
    same = masked_losses(infrared, infrared, infrared, visible, ones, ones)
    assert same["intensity"].abs().max() < 1e-6


def test_the_complement_is_the_metric_turned_round():
    torch.manual_seed(0)
    infrared, visible, fused = (torch.randint(0, 256, (3, 1, 48, 48)) for _ in range(3))
    trio = [x[:, 0].byte() for x in (infrared, visible, fused)]
    scd = fusion_metrics(*trio, names=("SCD",))["SCD"].mean()
    loss = complement_loss(*(x / 255 for x in (fused, infrared, visible)))
    assert loss == pytest.approx(1 - float(scd) / 2, abs=1e-4)


def test_a_constant_crop_has_no_complement_and_no_nan():
    flat = torch.zeros(2, 1, 16, 16, requires_grad=True)
    loss = complement_loss(flat, torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16))
    loss.backward()
    assert loss == 1 and torch.isfinite(flat.grad).all()


def test_smooth_qabf_is_near_the_true_one_and_has_a_gradient_everywhere():
    torch.manual_seed(0)
    flat = torch.zeros(2, 60, 60)
    infrared, visible = (torch.randint(0, 256, (2, 60, 60)).float() for _ in range(2))
    for fused in ((infrared + visible) / 2, torch.maximum(infrared, visible), infrared):
        trio = torch.stack([infrared, visible, fused]).double()
        for one in trio.split(1, dim=1):
            assert torch.allclose(smooth_edge_transfer(one), edge_transfer(one, "interior")[0], atol=0.02)
    dull = flat.clone().requires_grad_(True)
    metric_loss(dull[:, None] / 255, infrared[:, None] / 255, visible[:, None] / 255).backward()
    assert torch.isfinite(dull.grad).all()


def test_a_dark_crop_weighs_in_the_metric_loss_what_it_weighs_in_a_frame():
    torch.manual_seed(0)
    textured, faint = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64) / 255
    sources, fused = torch.cat([textured, faint]), torch.cat([textured, 1 - faint])
    both, alone = metric_loss(fused, sources, sources), metric_loss(textured, textured, textured)
    apart = (alone + metric_loss(1 - faint, faint, faint)) / 2
    assert both - alone < 0.2 * (apart - alone)


def test_descending_the_metric_loss_raises_the_metrics():
    batch = [x.clamp(0, 1) for x in drawn_pairs(2, 48)[:2]]
    infrared, visible = batch[0], luminance(batch[1])

    def measured(fused):
        grey = [grey8(x.detach().clamp(0, 1)) for x in (infrared, visible, fused)]
        return torch.stack(list(fusion_metrics(*grey, names=("Qabf", "SCD"), qabf="interior").values())).mean(1)

    fused = ((infrared + visible) / 2).requires_grad_(True)
    before, optimiser = measured(fused), torch.optim.Adam([fused], 1e-2)
    for _ in range(20):
        loss = metric_loss(fused, infrared, visible)
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    assert (measured(fused) > before).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_papers_losses_are_alone_unless_settings_add_to_them(channels):
    torch.manual_seed(0)
    fused, visible = torch.rand(2, 2, channels, 48, 48)
    infrared = torch.rand(2, 1, 48, 48)
    assert own_losses(fused, infrared, visible, FuserSettings()) == 0
    grey = [x if x.shape[1] == 1 else luminance(x) for x in (fused, infrared, visible)]
    both = own_losses(fused, infrared, visible, FuserSettings(complement_weight=2.0, metric_weight=3.0))
    expected = 2 * complement_loss(fused, infrared, visible) + 3 * metric_loss(*grey)
    assert torch.allclose(both, expected)


def test_crops_have_to_be_large_enough_for_the_metrics():
    assert FuserSettings(crop=32).crop == 32
    with pytest.raises(UsageError, match=r"crop is 40; with a metric_weight use 41 or more"):
        FuserSettings(crop=40, metric_weight=1.0)
