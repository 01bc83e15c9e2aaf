"""SGDFuse's training: Stage I until it is good, then Stage II on its pictures (arXiv 2508.05264).

Stage I learns from both sources at once (brightest pixel, sharpest gradient). Stage II learns to return F1 from noise,
and where the masks are, what the sources have there. Where the network sees the pair beside x_t, its estimate is worth
as much at any noise level, so that all levels count alike; where it sees x_t alone (paper5), the signal-to-noise ratio,
up to 5, weighs the diffusion term and ᾱ_t the others.

Legend: B batch, c channels, H W crop (multiples of the model's stride), t training step; pictures 0..1 unless said.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from models.errors import UsageError
from models.fusers.colour import luminance
from models.fusers.diffusion import noised
from models.fusers.losses import masked_losses, maximum_loss, own_losses
from models.fusers.masks import disturb
from models.fusers.precision import autocast
from models.fusers.settings import FuserSettings
from models.fusers.sgdfuse import Estimate, SGDFuse
from models.fusers.training import Pairs, average_into, cosine_rate, descend, set_rate, with_initial_rates

MOST_SIGNAL = 5.0


class Refinement(nn.Module):
    """SGDFuse, its average, and the optimisers of both stages; `iterate` is one step of the stage whose turn it is."""

    def __init__(self, settings: FuserSettings, model: SGDFuse) -> None:
        super().__init__()
        if settings.crop % model.stride:
            raise UsageError(f"fuser.crop is {settings.crop}; with this network use a multiple of {model.stride}.")
        self.settings, self.model = settings, model
        self.averaged = deepcopy(model).eval().requires_grad_(False)
        self.first_optimiser = with_initial_rates(torch.optim.Adam(model.first.parameters(), settings.rate))
        self.second_optimiser = with_initial_rates(torch.optim.Adam(model.denoiser.parameters(), settings.rate))

    def parts(self, name: str) -> dict:
        """What a checkpoint has to hold, by name."""
        return {name: self, f"{name}.first": self.first_optimiser, f"{name}.second": self.second_optimiser}

    @property
    def fuser(self) -> SGDFuse:
        """The averaged weights, ready to be saved."""
        return self.averaged

    def take_first(self, other: SGDFuse) -> None:
        """Starts with the Stage I of `other`; with a `first_share` of 0 it stays."""
        for model in (self.model, self.averaged):
            model.first.load_state_dict(other.first.state_dict())

    def iterate(self, pairs: Pairs, step: int) -> dict[str, Tensor]:
        """One step of Stage I, or after its share of the iterations, of Stage II; returns the losses, detached."""
        s = self.settings
        turn = round(s.first_share * s.iterations)
        place, total = (step, turn) if step < turn else (step - turn, s.iterations - turn)
        optimiser = self.first_optimiser if step < turn else self.second_optimiser
        set_rate(optimiser, cosine_rate(place, total, s.rate_last / s.rate))
        losses = self.first_step(pairs) if step < turn else self.second_step(pairs)
        self._average(place)
        return {name: value.detach() for name, value in losses.items()}

    def first_step(self, pairs: Pairs) -> dict[str, Tensor]:
        """Stage I alone."""
        self.model.train()
        with autocast(pairs.infrared.device):
            first = self.model.first_picture(2 * pairs.infrared - 1, 2 * pairs.visible - 1).float()
        s, drawn, visible = self.settings, (first + 1) / 2, self._visible(pairs)
        loss = maximum_loss(drawn, pairs.infrared, visible, s.gradient_weight)
        loss = loss + own_losses(drawn, pairs.infrared, visible, s)
        descend(loss, self.first_optimiser)
        return {"first": loss}

    def second_step(self, pairs: Pairs) -> dict[str, Tensor]:
        """Stage II alone, on the averaged Stage I's pictures."""
        s = self.settings
        self.model.train()
        losses = self.second_losses(pairs)
        total = losses["diffusion"] + s.intensity_weight * losses["intensity"]
        total = total + s.edge_weight * losses["gradient"] + s.background_weight * losses["background"]
        descend(total, self.second_optimiser)
        return losses

    def second_losses(self, pairs: Pairs) -> dict[str, Tensor]:
        """diffusion, intensity, gradient and background, unweighted by the settings; masks are disturbed."""
        model = self.model
        with torch.no_grad(), autocast(pairs.infrared.device):
            first = self.averaged.first_picture(2 * pairs.infrared - 1, 2 * pairs.visible - 1).float()
        masks = [self._mask(mask, pairs.infrared) for mask in (pairs.mask_infrared, pairs.mask_visible)]
        conditions = model.conditioning(first, 2 * pairs.infrared - 1, 2 * pairs.visible - 1, torch.cat(masks, 1))
        share, noise = self._draw(first)
        with autocast(first.device):
            told = model.denoiser(noised(first, noise, share), conditions, share)
        told = Estimate(*(None if x is None else x.float() for x in told))
        alike = model.conditions == "all"
        ratio = torch.ones_like(share) if alike else (share / (1 - share).clamp_min(1e-6)).clamp_max(MOST_SIGNAL)
        diffusion = first.new_zeros(())
        if model.denoiser.for_clean is not None:
            diffusion = (ratio * (told.clean - first).square().flatten(1).mean(1)).mean()
        if told.noise is not None:
            diffusion = diffusion + (told.noise - noise).square().mean()
        guided = masked_losses(
            (told.clean + 1) / 2, (first + 1) / 2, pairs.infrared, self._visible(pairs), masks[0], masks[1]
        )
        weight = torch.ones_like(share) if alike else share
        return {"diffusion": diffusion} | {name: (weight * value).mean() for name, value in guided.items()}

    def _draw(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ [B], one per image and anywhere between two steps of the schedule, and ε."""
        model, count = self.model, len(first)
        if model.start == "clean":
            return first.new_ones(count), torch.zeros_like(first)
        last = model.tau + 1 if model.start == "first" else len(model.shares)
        t = torch.randint(last, (count,), device=first.device)
        after, before = model.shares[t], torch.where(t > 0, model.shares[(t - 1).clamp_min(0)], 1.0)
        root = before.sqrt() + (after.sqrt() - before.sqrt()) * torch.rand(count, device=first.device)
        return root.square(), torch.randn_like(first)

    def _mask(self, mask: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if mask is None else disturb(mask, self.settings.disturb, self.settings.drop)

    def _visible(self, pairs: Pairs) -> Tensor:
        return pairs.visible if self.model.channels == 3 else luminance(pairs.visible)

    def _average(self, place: int) -> None:
        average_into(self.averaged, self.model, min(self.settings.average, (1 + place) / (10 + place)))
