"""The pull of a denoiser to a recogniser's features: what is heard, what is compared, what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import cosine_similarity

from models.generators.alignment import Aligner, targets_of
from models.generators.recognition import RecogniserSettings, build_recogniser


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16, 24),
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], cross_attention_dim=8,
        attention_head_dim=4, norm_num_groups=4,
    )


def say(denoiser, latents):
    return denoiser(latents, torch.tensor([5] * len(latents)), torch.zeros(len(latents), 2, 8)).sample


def test_features_that_agree_cell_by_cell_cost_nothing_and_opposite_ones_most(denoiser):
    """Targets made from what is heard: the loss is a cosine of each cell, whatever the length."""
    aligner = Aligner(denoiser, width=24)
    with torch.no_grad():
        for project, channels in zip(aligner.project, (24, 16), strict=True):
            project.weight.copy_(torch.eye(24)[:, :channels, None, None])
            project.bias.zero_()
    with aligner.listening(denoiser):
        say(denoiser, torch.randn(2, 3, 8, 8))
        middle, above = (aligner._heard[n].detach() for n in range(2))
        assert middle.shape == (2, 24, 2, 2) and above.shape == (2, 16, 4, 4)
        target = torch.nn.functional.interpolate(3 * middle, scale_factor=2)  # averaging undoes it
        padded = torch.cat([above, torch.zeros(2, 8, 4, 4)], 1)
        apart = float(1 - cosine_similarity(padded, target, 1).mean())
        assert aligner.loss(target).item() == pytest.approx(apart, abs=1e-5)
        assert aligner.loss(-target).item() == pytest.approx(2 + 2 - apart, abs=1e-5)


def test_the_pull_reaches_the_denoiser_up_to_the_middle_and_no_further(denoiser):
    aligner = Aligner(denoiser, width=5)
    with aligner.listening(denoiser):
        say(denoiser, torch.randn(2, 3, 8, 8))
        aligner.loss(torch.randn(2, 5, 4, 4)).backward()
    pulled = {name.split(".")[0] for name, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"conv_in", "down_blocks", "mid_block"} <= pulled and not pulled & {"up_blocks", "conv_out"}
    assert all(p.grad is not None for p in aligner.parameters())


def test_nothing_is_heard_outside_and_nothing_stays(denoiser):
    keys, aligner = set(denoiser.state_dict()), Aligner(denoiser, width=5)
    with aligner.listening(denoiser):
        assert aligner._heard == {}
    say(denoiser, torch.randn(1, 3, 8, 8))
    assert aligner._heard == {} and set(denoiser.state_dict()) == keys
    hooks = [module for module in denoiser.modules() if module._forward_hooks]
    assert not hooks


def test_the_projection_depends_on_its_seed_alone(denoiser):
    torch.manual_seed(1)
    one = Aligner(denoiser, 5, seed=3)
    torch.manual_seed(2)
    same, other = Aligner(denoiser, 5, seed=3), Aligner(denoiser, 5, seed=4)
    assert torch.equal(one.project[0].weight, same.project[0].weight)
    assert not torch.equal(one.project[0].weight, other.project[0].weight)


def test_targets_are_what_sets_a_picture_apart_from_the_others():
    recogniser = build_recogniser(4, RecogniserSettings(widths=(4, 8, 12, 12))).eval()
    pictures = torch.rand(5, 3, 32, 48) * 2 - 1
    found = targets_of(recogniser, pictures, batch=2)
    assert found.shape == (5, recogniser.described, 4, 6) == (5, 12, 4, 6) and not found.requires_grad
    assert found.mean((0, 2, 3)).abs().max() < 1e-5
    with torch.no_grad():
        seen = recogniser.describe(pictures)
    assert torch.allclose(found - found[:1], seen - seen[:1], atol=1e-5)
