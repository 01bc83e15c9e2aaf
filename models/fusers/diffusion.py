"""Noise schedules and the deterministic sampler of SGDFuse's Stage II.

Schedules are those of diffusers; the sampler is DDIM (Song, Meng and Ermon 2021) for a network that estimates x_0,
because diffusers' own takes no list of timesteps, and the truncated start needs one.

Legend: B batch, c channels, H W height and width, T training steps, S sampling steps; ᾱ_t the share of x_0's variance
in x_t; pictures are in [-1,1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def schedule(steps: int = 1000, first: float = 1e-6, last: float = 1e-2, zero_terminal: bool = False) -> Tensor:
    """ᾱ [T] of linear betas. zero_terminal: rescaled so that ᾱ_T = 0 (Lin et al. 2024), for starts from pure noise."""
    from diffusers import DDIMScheduler

    with torch.device("cpu"):
        return DDIMScheduler(
            num_train_timesteps=steps, beta_start=first, beta_end=last, rescale_betas_zero_snr=zero_terminal
        ).alphas_cumprod


def timesteps(start: int, steps: int) -> list[int]:
    """S indices from `start` (counted from 0) downwards, evenly: 999, 4 -> 999, 749, 499, 249."""
    return [round((start + 1) * (steps - i) / steps) - 1 for i in range(steps)]


def noised(clean: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """x_t of x_0 and ε [B,c,H,W] for ᾱ [B]."""
    share = share.to(clean).view(-1, 1, 1, 1)
    return share.sqrt() * clean + (1 - share).sqrt() * noise


def noise_like(clean: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, image i from CPU generator i: the same in any batch and on any device."""
    return torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws]).to(clean)


def ddim(
    estimate: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    shares: Sequence[float],
    plan: Sequence[int],
    draws: Sequence[torch.Generator],
    eta: float = 0.0,
) -> Tensor:
    """x_t at t = plan[0] -> x_0.

    estimate    (x_t, ᾱ_t [B]) -> x_0 in [-1,1]
    shares      ᾱ of all training steps
    plan        timesteps, falling
    eta         0: deterministic; 1: as much noise as ancestral sampling
    """
    for t, after in zip(plan, [*plan[1:], None], strict=True):
        here, there = shares[t], 1.0 if after is None else shares[after]
        clean = estimate(x, torch.full((len(x),), here, device=x.device)).clamp(-1, 1)
        noise = (x - here**0.5 * clean) / max(1 - here, 1e-12) ** 0.5
        sigma = eta * ((1 - there) / max(1 - here, 1e-12) * (1 - here / there)) ** 0.5
        x = there**0.5 * clean + max(1 - there - sigma**2, 0.0) ** 0.5 * noise
        if sigma:
            x = x + sigma * noise_like(x, draws)
    return x
