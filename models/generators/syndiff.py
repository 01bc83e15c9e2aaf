"""SynDiff: unpaired translation by adversarial conditional diffusion, for any channel counts and image sizes.

Özbey et al., "Unsupervised Medical Image Translation With Adversarial Diffusion Models", IEEE TMI 2023: four large
reverse steps (their eq. 6-9), each by a generator G^d trained against a time-conditioned discriminator D^d
(eq. 10-12), on source estimates that a cycle-consistent pair G^n, D^n makes, so that no pairs are needed (eq. 13-16).
After training only G^d remains, and the real source conditions it.
This file holds the schedule and the sampler; `adversaries.py` trains them.

Legend: B batch, c channels, H W height and width, T steps; x_0 is clean, x_T almost pure noise; images in [-1,1].
The index t of a network call is 0..T-1: it takes x_{t+1} to an estimate of x_0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.generators.networks import DiffusiveGenerator
from models.generators.pictures import pad_to_stride, to_picture, to_tensor
from models.generators.settings import CHANNELS, TranslateSettings


def schedule(steps: int) -> DDPMScheduler:
    """The variance-preserving SDE (β from 0.1 to 20) at `steps` + 1 times, as a diffusers scheduler."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps * (1 - 1e-3) + 1e-3
    kept = torch.exp(-0.5 * 19.9 * times**2 - 0.1 * times)
    betas = (1 - kept[1:] / kept[:-1]).tolist()
    return DDPMScheduler(
        num_train_timesteps=steps,
        trained_betas=betas,
        prediction_type="sample",
        variance_type="fixed_small",
        clip_sample=False,
    )


class Diffusion:
    """Draws the training pairs (x_t, x_{t+1}) and the posterior, with one t per image."""

    def __init__(self, steps: int):
        self.steps = steps
        plan = schedule(steps)
        self.betas, after = plan.betas, plan.alphas_cumprod
        before = torch.cat([torch.ones(1), after[:-1]])
        self.kept = before  # share of x_0's variance in x_t, t=0..T-1
        self.of_clean = before.sqrt() * self.betas / (1 - after)
        self.of_next = (1 - self.betas).sqrt() * (1 - before) / (1 - after)
        self.deviation = ((1 - before) / (1 - after) * self.betas).sqrt()

    def pair(self, clean: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and x_{t+1} [B,c,H,W] for t [B]; x_{t+1} is drawn from x_t, not on its own."""
        kept, beta = _at(self.kept, t, clean), _at(self.betas, t, clean)
        x = kept.sqrt() * clean + (1 - kept).sqrt() * torch.randn_like(clean)
        return x, (1 - beta).sqrt() * x + beta.sqrt() * torch.randn_like(clean)

    def posterior(self, clean: Tensor, x_next: Tensor, t: Tensor) -> Tensor:
        """A draw of q(x_t | x_{t+1}, x_0 = clean); `clean` itself at t = 0."""
        mean = _at(self.of_clean, t, clean) * clean + _at(self.of_next, t, clean) * x_next
        return mean + _at(self.deviation, t, clean) * torch.randn_like(clean)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table.to(like.device, like.dtype)[t][:, None, None, None]


class SynDiff(nn.Module):
    """One fitted translator: the averaged G^d and its sampler."""

    def __init__(self, source: int, target: int, steps: int = 4, **shape):
        """source, target: channel counts; shape: further arguments of `DiffusiveGenerator`."""
        super().__init__()
        self.config = {"source": source, "target": target, "steps": steps, **shape}
        self.network = DiffusiveGenerator(source, target, **shape)
        self.steps = steps

    @classmethod
    def of(cls, settings: TranslateSettings, direction: str) -> SynDiff:
        return cls(1, CHANNELS[direction], settings.steps, **shape_of(settings))

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.config, indent=1))
        save_file(
            {k: v.contiguous().cpu() for k, v in self.network.state_dict().items()}, f"{folder}/model.safetensors"
        )

    @classmethod
    def load(cls, folder: Path) -> SynDiff:
        """The translator that `save` wrote, on the GPU where there is one."""
        model = cls(**json.loads((Path(folder) / "config.json").read_text()))
        model.network.load_state_dict(load_file(f"{folder}/model.safetensors"))
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def sample(self, source: Tensor, seeds: Sequence[int]) -> Tensor:
        """source [B,c_source,H,W] in [-1,1], one seed per image -> [B,c_target,H,W] in [-1,1].

        Image i depends on source i and seed i only: its start, its latents and its posterior noise come from one
        generator on the CPU, whatever the batch and the device.
        """
        height, width = source.shape[2:]
        source = pad_to_stride(source, self.network.stride)
        draws = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        x = _noise(draws, (self.network.target, *source.shape[2:]), source)
        plan = schedule(self.steps)
        for t in reversed(range(self.steps)):
            z = _noise(draws, (self.network.latent,), source)
            with autocast(source.device):
                clean = self.network(x, source, torch.full((len(draws),), t, device=source.device), z)
            x = plan.step(clean.float(), t, x, generator=draws).prev_sample
        return x[:, :, :height, :width].clamp(-1, 1)

    def translate(self, images: Sequence[np.ndarray], seeds: Sequence[int], batch: int = 16) -> list[np.ndarray]:
        """uint8 [H,W] each -> uint8 [H,W] or [H,W,3] each.

        On a CPU one at a time, which is no slower there and makes the bytes independent of their neighbours.
        """
        device = next(self.parameters()).device
        drawn: list[np.ndarray] = []
        for group in _same_sized(images, batch if device.type == "cuda" else 1):
            source = torch.stack([to_tensor(images[i]) for i in group]).to(device)
            drawn += [to_picture(image) for image in self.sample(source, [seeds[i] for i in group])]
        return drawn


def shape_of(settings: TranslateSettings) -> dict:
    """The settings that decide the diffusive generator's weights."""
    names = ("channels", "layers", "patch", "attention", "latent", "identity_start")
    return {name: getattr(settings, name) for name in names}


def _noise(draws: list[torch.Generator], shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(like.device, like.dtype)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the device has it."""
    usable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=usable)


def _same_sized(images: Sequence[np.ndarray], most: int) -> list[list[int]]:
    """Consecutive indices of images of one size, at most `most` together."""
    groups: list[list[int]] = []
    for i, image in enumerate(images):
        if groups and len(groups[-1]) < most and images[groups[-1][0]].shape == image.shape:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
