"""SynDiff's training: what one direction trains, and one iteration of it (Özbey et al. 2023, algorithm 1).

Domain 0 is infrared, domain 1 the visible target. `guess[d]` is a cycle generator's estimate in domain d of the
other domain's picture. Adversarial terms are the non-saturating softplus ones. What differs from the released code:
gradients flow only where they are used, the cycle generators' outputs are computed once per iteration (their weights
do not change in between), and the two domains are drawn independently by the caller.
R1 (Mescheder et al. 2018) is lazy and, as in that code, not multiplied by its interval: its effective weight is
r1_weight / r1_every.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import l1_loss, softplus

from models.generators.networks import CycleGenerator, DiffusiveDiscriminator, DiffusiveGenerator, PatchDiscriminator
from models.generators.pictures import structure_loss
from models.generators.settings import CHANNELS, TranslateSettings
from models.generators.syndiff import Diffusion, SynDiff, autocast, shape_of


class Adversaries(nn.Module):
    """Both generators and both discriminators of one direction, the average, and their optimisers.

    With several processes the gradients are averaged over them; build it from the same seed on each.
    """

    def __init__(self, settings: TranslateSettings, direction: str):
        super().__init__()
        self.settings, s = settings, settings
        c = (1, CHANNELS[direction])
        cycle = {"width": s.cycle_width, "blocks": s.cycle_blocks, "identity_start": s.identity_start}
        self.ways = ((1, 0), (0, 1)) if s.both_ways else ((1, 0),)  # (domain that is drawn, domain that conditions)
        self.cycle = nn.ModuleList([CycleGenerator(c[1], c[0], **cycle), CycleGenerator(c[0], c[1], **cycle)])
        self.diffusive = nn.ModuleList(DiffusiveGenerator(c[b], c[a], **shape_of(s)) for a, b in self.ways)
        self.judges = nn.ModuleList(DiffusiveDiscriminator(c[a], s.discriminator_channels) for a, _ in self.ways)
        self.patch_judges = nn.ModuleList(PatchDiscriminator(n, s.patch_width, s.patch_layers, s.patch_norm) for n in c)
        self.translator = SynDiff.of(s, direction).requires_grad_(False)
        self.translator.network.load_state_dict(self.diffusive[0].state_dict())
        self.diffusion = Diffusion(s.steps)
        self.generator_parameters = [*self.cycle.parameters(), *self.diffusive.parameters()]
        self.judge_parameters = [*self.judges.parameters(), *self.patch_judges.parameters()]
        self.generator_optimiser = torch.optim.Adam(self.generator_parameters, s.rate_generator, betas=(0.5, 0.9))
        self.judge_optimiser = torch.optim.Adam(self.judge_parameters, s.rate_discriminator, betas=(0.5, 0.9))

    def parts(self, name: str) -> dict:
        """What a checkpoint has to hold, by name."""
        return {
            name: self,
            f"{name}.generators": self.generator_optimiser,
            f"{name}.discriminators": self.judge_optimiser,
        }

    def iterate(self, infrared: Tensor, target: Tensor, step: int) -> dict[str, Tensor]:
        """One iteration on [B,1,H,W] and [B,c,H,W] in [-1,1], drawn independently; returns the losses, detached."""
        clean = (infrared, target)
        self._set_rates(step)
        with autocast(infrared.device):
            guess = [net(x) for net, x in zip(self.cycle, reversed(clean), strict=True)]
        losses = self._judge(clean, [g.detach() for g in guess], regularise=step % self.settings.r1_every == 0)
        losses |= self._generate(clean, guess)
        self._average(step)
        return {name: loss.detach() for name, loss in losses.items()}

    def _judge(self, clean: tuple, guess: list[Tensor], regularise: bool) -> dict[str, Tensor]:
        with autocast(guess[0].device):
            losses = {"patch_judge": sum(map(_judged, self.patch_judges, clean, guess)), "judge": 0.0, "r1": 0.0}
        for (a, b), generator, judge in zip(self.ways, self.diffusive, self.judges, strict=True):
            with torch.no_grad():
                t, x, x_next, _, fake = self._draw(generator, clean[a], guess[b])
            with autocast(x.device):
                real_loss, fake_loss = softplus(-judge(x, x_next, t)).mean(), softplus(judge(fake, x_next, t)).mean()
            losses["judge"] += real_loss + fake_loss
            if regularise:
                losses["r1"] += self.settings.r1_weight / 2 * gradient_penalty(judge, x, x_next, t)
        _descend(self.judge_optimiser, self.judge_parameters, sum(losses.values()))
        return {name: loss for name, loss in losses.items() if name != "r1" or regularise}

    def _generate(self, clean: tuple, guess: list[Tensor]) -> dict[str, Tensor]:
        s, zero = self.settings, clean[0].new_zeros(())
        names = ("fool", "patch_fool", "clean", "cycle", "structure")
        losses = dict.fromkeys(names, zero)
        _require_gradients(self.judge_parameters, False)
        with autocast(zero.device):
            for domain in (0, 1):
                other = 1 - domain
                back = self.cycle[other](guess[domain])
                losses["patch_fool"] = losses["patch_fool"] + softplus(-self.patch_judges[domain](guess[domain])).mean()
                losses["cycle"] = losses["cycle"] + s.cycle_weight * l1_loss(back, clean[other])
                if s.structure_weight:
                    kept = structure_loss(clean[other].float(), guess[domain].float())
                    losses["structure"] = losses["structure"] + s.structure_weight * kept
            for (a, b), generator, judge in zip(self.ways, self.diffusive, self.judges, strict=True):
                t, _, x_next, estimate, fake = self._draw(generator, clean[a], guess[b])
                losses["fool"] = losses["fool"] + softplus(-judge(fake, x_next, t)).mean()
                losses["clean"] = losses["clean"] + s.cycle_weight * l1_loss(estimate, clean[a])
                if s.structure_weight:
                    kept = structure_loss(guess[b].detach().float(), estimate.float())
                    losses["structure"] = losses["structure"] + s.structure_weight * kept
        _descend(self.generator_optimiser, self.generator_parameters, sum(losses.values()))
        _require_gradients(self.judge_parameters, True)
        return losses

    def _draw(self, generator: DiffusiveGenerator, clean: Tensor, source: Tensor) -> tuple[Tensor, ...]:
        """t, x_t, x_{t+1}, the generator's estimate of x_0, and the fake x_t drawn from it."""
        t = torch.randint(self.diffusion.steps, (len(clean),), device=clean.device)
        x, x_next = self.diffusion.pair(clean, t)
        z = torch.randn(len(clean), generator.latent, device=clean.device)
        with autocast(clean.device):
            estimate = generator(x_next, source, t, z).float()
        return t, x, x_next, estimate, self.diffusion.posterior(estimate, x_next, t)

    def _set_rates(self, step: int) -> None:
        s = self.settings
        share = (1 + math.cos(math.pi * step / max(1, s.iterations))) / 2
        for optimiser, first in (
            (self.generator_optimiser, s.rate_generator),
            (self.judge_optimiser, s.rate_discriminator),
        ):
            for group in optimiser.param_groups:
                group["lr"] = s.rate_last + (first - s.rate_last) * share

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.settings.average, (1 + step) / (10 + step))
        old, new = list(self.translator.network.parameters()), list(self.diffusive[0].parameters())
        torch._foreach_lerp_(old, new, 1 - decay)


def gradient_penalty(judge: DiffusiveDiscriminator, x: Tensor, x_next: Tensor, t: Tensor) -> Tensor:
    """Mean squared gradient of the judge's logits at the real x_t, in float32 (R1 without its factor γ/2)."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(judge(x, x_next, t).sum(), x, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def _judged(judge: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-judge(real)).mean() + softplus(judge(fake)).mean()


def _descend(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if dist.is_initialized() and dist.get_world_size() > 1:
        _average_gradients(parameters)
    optimiser.step()


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


def _require_gradients(parameters: Iterable[nn.Parameter], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)
