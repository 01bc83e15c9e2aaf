"""The schedule and sampler of SynDiff: the spec's numbers, an oracle, and images that mind their own business."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.generators.settings import TranslateSettings
from models.generators.syndiff import Diffusion, SynDiff, schedule

TINY = {"channels": (8, 16), "layers": 1, "attention": False, "latent": 4}


def tiny(**changes) -> SynDiff:
    torch.manual_seed(0)
    return SynDiff(1, 3, **{**TINY, **changes}).eval()


def test_the_schedule_has_the_spec_numbers():
    plan, diffusion = schedule(4), Diffusion(4)
    expected = [0.478255, 0.849206, 0.956418, 0.987404]
    torch.testing.assert_close(plan.betas, torch.tensor(expected), atol=1e-6, rtol=0)
    kept = [0.521745, 0.078676, 0.003429, 4.32e-5]
    torch.testing.assert_close(plan.alphas_cumprod, torch.tensor(kept), atol=1e-6, rtol=0)
    variances = torch.tensor([0, 0.440819, 0.884202, 0.984061])
    torch.testing.assert_close(diffusion.deviation**2, variances, atol=1e-6, rtol=0)
    of_clean, of_next = torch.tensor([1, 0.665778, 0.269191, 0.057822]), torch.tensor([0, 0.201576, 0.193001, 0.111852])
    torch.testing.assert_close(diffusion.of_clean, of_clean, atol=1e-6, rtol=0)
    torch.testing.assert_close(diffusion.of_next, of_next, atol=1e-6, rtol=0)


@pytest.mark.parametrize("t", range(4))
def test_the_posterior_of_training_is_the_step_of_sampling(t):
    clean, x_next = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    torch.manual_seed(t)
    drawn = Diffusion(4).posterior(clean, x_next, torch.tensor([t, t]))
    torch.manual_seed(t)
    stepped = schedule(4).step(clean, t, x_next).prev_sample
    torch.testing.assert_close(drawn, stepped, atol=1e-6, rtol=1e-5)
    if t == 0:
        torch.testing.assert_close(stepped, clean, atol=1e-6, rtol=0)
        torch.testing.assert_close(drawn, clean, atol=1e-6, rtol=0)


def test_the_noisier_picture_is_drawn_from_the_noisy_one():
    """x_{t+1} given x_t has variance β whatever x_t is; drawn from x_0 on its own it would be far from x_t."""
    clean, t = torch.zeros(2000, 1, 1, 1), torch.full((2000,), 1)
    torch.manual_seed(0)
    x, x_next = Diffusion(4).pair(clean, t)
    beta = schedule(4).betas[1]
    left = x_next - (1 - beta).sqrt() * x
    assert left.var() == pytest.approx(beta.item(), rel=0.1)
    assert torch.corrcoef(torch.stack([x.flatten(), left.flatten()]))[0, 1].abs() < 0.1


def test_with_an_oracle_four_steps_return_its_answer():
    model = tiny()
    answer = torch.rand(2, 3, 8, 8) * 2 - 1
    model.network.forward = lambda x, source, t, z: answer
    torch.testing.assert_close(model.sample(torch.zeros(2, 1, 8, 8), [1, 2]), answer, atol=1e-6, rtol=0)


def test_an_image_depends_on_its_own_source_and_seed_only():
    model = tiny()
    source = torch.rand(3, 1, 16, 16)
    together = model.sample(source, [7, 8, 9])
    alone = model.sample(source[1:2], [8])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(model.sample(source[1:2], [7]), alone, atol=1e-2)
    pictures = [np.full((16, 16), value, np.uint8) for value in (0, 90, 200)]
    assert np.array_equal(model.translate(pictures, [1, 2, 3])[2], model.translate(pictures[2:], [3])[0])


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (3, 5)])
@pytest.mark.parametrize("patch", [1, 2])
def test_any_size_comes_back_as_it_was(size, patch):
    (picture,) = tiny(patch=patch).translate([np.zeros(size, np.uint8)], [0])
    assert picture.shape == (*size, 3) and picture.dtype == np.uint8


def test_a_saved_translator_draws_the_same(tmp_path):
    model = tiny(identity_start=True)
    model.save(tmp_path)
    source = [np.arange(256, dtype=np.uint8).reshape(16, 16)]
    assert np.array_equal(SynDiff.load(tmp_path).translate(source, [5])[0], model.translate(source, [5])[0])
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_an_identity_start_returns_the_source():
    source = torch.rand(1, 1, 16, 16) * 1.8 - 0.9
    drawn = tiny(identity_start=True).sample(source, [0])
    torch.testing.assert_close(drawn, source.expand(1, 3, 16, 16), atol=1e-2, rtol=0)


def test_the_paper_sizes_are_the_defaults():
    """33.0 M parameters, measured on the lean variant of the specification."""
    with torch.device("meta"):
        network = SynDiff.of(TranslateSettings(), "lightness").network
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(33.0e6, rel=0.02)
