"""The schedules' numbers, and the sampler against an oracle and against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from models.fusers.diffusion import ddim, noise_like, noised, schedule, timesteps


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_schedules_have_the_measured_ends():
    assert schedule()[-1].item() == pytest.approx(0.0066226, abs=1e-6)
    assert schedule(60)[-1].item() == pytest.approx(0.7400454, abs=1e-6)
    assert schedule()[245].item() == pytest.approx(0.739, abs=1e-3), "where 60 steps of the short schedule end"
    assert schedule(zero_terminal=True)[-1] == 0


def test_timesteps_fall_evenly():
    assert timesteps(999, 4) == [999, 749, 499, 249]
    assert timesteps(999, 1) == [999] and timesteps(245, 1) == [245]
    assert timesteps(245, 4)[0] == 245 and len(set(timesteps(245, 4))) == 4
    assert len(timesteps(999, 1000)) == 1000 and timesteps(999, 1000)[-1] == 0


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("start", [999, 245])
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_an_oracle_is_believed(steps, start, zero_terminal):
    torch.manual_seed(0)
    answer = torch.rand(2, 1, 6, 6) * 2 - 1
    shares = schedule(zero_terminal=zero_terminal)
    x = noised(answer, torch.randn_like(answer), shares[start].expand(2))
    found = ddim(lambda x, share: answer, x, shares.tolist(), timesteps(start, steps), generators(0, 1))
    torch.testing.assert_close(found, answer, atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_it_is_diffusers_ddim(zero_terminal):
    plan = DDIMScheduler(
        1000, 1e-6, 1e-2, "linear", prediction_type="sample", timestep_spacing="trailing", clip_sample=True,
        rescale_betas_zero_snr=zero_terminal,
    )  # fmt: skip
    plan.set_timesteps(4)
    torch.manual_seed(0)
    x = start = torch.randn(2, 1, 5, 5)
    for t in plan.timesteps:
        x = plan.step(0.7 * x.tanh(), int(t), x).prev_sample
    shares = schedule(zero_terminal=zero_terminal).tolist()
    ours = ddim(lambda x, share: 0.7 * x.tanh(), start, shares, timesteps(999, 4), [])
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-4)


def test_eta_adds_noise_of_each_images_own():
    shares, x = schedule().tolist(), torch.randn(2, 1, 5, 5)

    def drawn(*seeds):
        return ddim(lambda x, share: 0.5 * x.tanh(), x, shares, timesteps(999, 4), generators(*seeds), eta=1.0)

    assert torch.equal(drawn(3, 4), drawn(3, 4))
    assert torch.equal(drawn(3, 4)[0], drawn(3, 9)[0]) and not torch.equal(drawn(3, 4)[1], drawn(3, 9)[1])
    still = ddim(lambda x, share: 0.5 * x.tanh(), x, shares, timesteps(999, 4), [], eta=0.0)
    assert not torch.allclose(still, drawn(3, 4), atol=1e-2)


def test_noise_has_the_share_it_should():
    torch.manual_seed(0)
    clean = torch.ones(2, 1, 100, 100)
    x = noised(clean, torch.randn_like(clean), torch.tensor([0.81, 0.19]))
    assert x.mean((1, 2, 3)).tolist() == pytest.approx([0.9, 0.19**0.5], abs=0.03)
    assert x.var((1, 2, 3)).tolist() == pytest.approx([0.19, 0.81], abs=0.03)
    assert torch.equal(noise_like(clean, generators(1, 2))[1], noise_like(clean[:1], generators(2))[0])
