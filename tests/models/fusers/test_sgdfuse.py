"""Configurations, conditions, seeds and sizes of SGDFuse."""

from __future__ import annotations

import pytest
import torch

from models.errors import UsageError
from models.fusers.colour import luminance
from models.fusers.sgdfuse import CONFIGURATIONS, HEADS, SGDFuse
from tests.models.fusers.small import pair, small


def lively(**changes) -> SGDFuse:
    """With heads that say something: at first those that start from F1 say nothing."""
    fuser = small("sgdfuse", **changes)
    head = fuser.denoiser.for_clean
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for part in (fuser.first.leave, *([] if head is None else [head.leave])):
            torch.nn.init.normal_(part.weight, std=0.3)
    return fuser


def masks(infrared: torch.Tensor) -> dict:
    return {"mask_infrared": (infrared > 0.6).float(), "mask_visible": (infrared < 0.2).float()}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@torch.inference_mode()
def test_every_configuration_draws_any_size(configuration):
    fuser = lively(configuration=configuration)
    for size in ((32, 32), (33, 50)):
        infrared, visible = pair(3, *size)
        out = fuser.fuse(infrared, visible, masks(infrared))
        assert out.image.shape == (3, 3, *size) and out.extras["first"].shape == (3, 1, *size)
        assert torch.isfinite(out.image).all() and out.image.min() >= 0 and out.image.max() <= 1
        torch.testing.assert_close(luminance(out.image), out.luminance, atol=0.2, rtol=0)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@torch.inference_mode()
def test_a_seed_decides_the_picture_whatever_the_batch(configuration):
    fuser = lively(configuration=configuration, eta=1.0)
    infrared, visible = pair(3)
    together = fuser.fuse(infrared, visible, {"seeds": [4, 5, 6]}).luminance
    singles = zip(infrared.split(1), visible.split(1), (4, 5, 6), strict=True)
    alone = [fuser.fuse(a, b, {"seeds": [seed]}).luminance for a, b, seed in singles]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    assert not torch.allclose(fuser.fuse(infrared, visible, {"seeds": [7, 5, 6]}).luminance[0], together[0], atol=1e-3)
    assert torch.equal(fuser.fuse(infrared, visible).luminance, fuser.fuse(infrared, visible).luminance)


@torch.inference_mode()
def test_padding_changes_nothing_but_the_border():
    fuser = small("sgdfuse")  # starts as the blend, which is local
    infrared, visible = pair(1, 32, 48)
    whole, cut = (fuser.fuse(infrared[..., :h, :w], visible[..., :h, :w]).luminance for h, w in ((32, 48), (29, 43)))
    torch.testing.assert_close(whole[..., :29, :43], cut, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_masks_matter_and_may_be_absent():
    fuser = lively()
    infrared, visible = pair(1)
    without, with_masks = fuser.fuse(infrared, visible), fuser.fuse(infrared, visible, masks(infrared))
    assert not torch.allclose(without.luminance, with_masks.luminance, atol=1e-4)
    assert torch.equal(without.extras["first"], with_masks.extras["first"]), "Stage I knows no masks"
    empty = {name: torch.zeros_like(infrared) for name in masks(infrared)}
    assert torch.equal(fuser.fuse(infrared, visible, empty).luminance, without.luminance)


@torch.inference_mode()
def test_steps_may_be_chosen_and_none_is_the_first_picture():
    fuser = lively()
    infrared, visible = pair(1)
    found = {steps: fuser.fuse(infrared, visible, {"steps": steps}) for steps in (0, 1, 2)}
    assert torch.equal(found[0].luminance, found[0].extras["first"])
    assert torch.equal(found[2].luminance, fuser.fuse(infrared, visible).luminance)
    assert not torch.allclose(found[1].luminance, found[2].luminance, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("start", ["noise", "first", "clean"])
@torch.inference_mode()
def test_every_head_and_start_samples_and_is_saved_whole(head, start, tmp_path):
    fuser = lively(head=head, start=start)
    fuser.save(tmp_path)
    infrared, visible = pair(1)
    out = fuser.fuse(infrared, visible)
    assert torch.isfinite(out.luminance).all()
    assert torch.equal(SGDFuse.load(tmp_path).fuse(infrared, visible).luminance, out.luminance)


@torch.inference_mode()
def test_a_fresh_one_starts_as_the_blend_of_the_pair():
    infrared, visible = pair(1)
    blend = (infrared + luminance(visible)) / 2
    for configuration in ("full", "fast", "refine1"):
        out = small("sgdfuse", configuration=configuration).fuse(infrared, visible)
        torch.testing.assert_close(out.luminance, blend, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("changes", "pure"), [
    ({}, True), ({"head": "plain"}, True), ({"head": "eps"}, False), ({"head": "dual"}, False),
    ({"start": "first"}, False), ({"configuration": "paper5"}, False),
])  # fmt: skip
def test_the_last_step_is_pure_noise_where_that_can_be_undone(changes, pure):
    """ε says nothing about x_0 where nothing of it is left."""
    assert (small("sgdfuse", **changes).plan[-1] == 0) == pure


def test_the_channels_are_those_of_the_configurations():
    with torch.device("meta"):
        widths = {name: small("sgdfuse", configuration=name).denoiser.unet.stem.in_channels for name in CONFIGURATIONS}
    assert widths == {"paper5": 5, "full": 6, "fast": 24, "refine1": 24}


@pytest.mark.parametrize(("changes", "words"), [
    ({"configuration": "slow"}, "paper5, full, fast, refine1"),
    ({"head": "x0"}, "hfah, plain, eps, dual"),
    ({"start": "end"}, "noise, first, clean"),
    ({"stride": 3}, "no setting stride"),
    ({"anchor": "median"}, "no anchor 'median'.*blend, mean, brightest, two_scale"),
    ({"conditions": "masks"}, "nothing tells of the pair"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_told(changes, words):
    with pytest.raises(UsageError, match=words):
        small("sgdfuse", **changes)


@pytest.mark.parametrize("size", [(160, 160), (480, 640), (329, 500)])
@pytest.mark.parametrize("configuration", ["paper5", "fast"])
def test_the_published_sizes_fit_the_full_network(configuration, size):
    with torch.device("meta"):
        fuser = SGDFuse(configuration).eval()
        infrared, visible = torch.empty(3, 1, *size), torch.empty(3, 3, *size)
    with torch.inference_mode():
        out = fuser.fuse(infrared, visible)
    assert out.image.shape == visible.shape and out.extras["first"].shape == infrared.shape
