"""SGDFuse: a first fused picture, then a diffusion that masks guide towards what is salient.

Zhang, Li, Fan, Ju, Fan, Liu, Kot, "SGDFuse: SAM-Guided Diffusion Model for High-Fidelity Infrared and Visible Image
Fusion", arXiv 2508.05264. `first_stage.py` makes F1; here a U-Net with HFAH (`unet.py`) refines it by a few DDIM
steps. The paper's text leaves open which channels are noised, what conditions the network, and where sampling starts;
hence four configurations:

    paper5    the network sees x_t and both masks (five channels), in colour; sampling starts from F1 with the noise of
              step τ, since from pure noise nothing would tell it about the pair
    full      it also sees F1, infrared and luminance, so that sampling may start from pure noise; luminance alone
    fast      the same on blocks of 2 x 2 pixels: about a quarter of the work per step
    refine1   fast, in one step: the baseline that any number of steps has to beat

Legend: B batch, c channels (1 luminance, 3 colour), H W height and width, r fold; inside, pictures are in [-1,1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UsageError
from models.fusers.anchors import ANCHORS
from models.fusers.base import Fuser
from models.fusers.colour import luminance
from models.fusers.diffusion import ddim, noise_like, noised, schedule, timesteps
from models.fusers.first_stage import FirstStage, before_tanh
from models.fusers.unet import AggregationHead, PlainHead, UNet
from models.generators.pictures import pad_to_stride

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "paper5": {"channels": 3, "conditions": "masks", "start": "first", "fold": 1, "steps": 4},
    "full": {"channels": 1, "conditions": "all", "start": "noise", "fold": 1, "steps": 4},
    "fast": {"channels": 1, "conditions": "all", "start": "noise", "fold": 2, "steps": 4},
    "refine1": {"channels": 1, "conditions": "all", "start": "noise", "fold": 2, "steps": 1},
}
HEADS = ("hfah", "plain", "eps", "dual")
STARTS = ("noise", "first", "clean")


class Estimate(NamedTuple):
    """What the denoiser says: x_0 (in [-1,1]) and ε, [B,c,H,W]; `noise` is None without a head for it."""

    clean: Tensor
    noise: Tensor | None


class Denoiser(nn.Module):
    """U-Net and head.

    conditions  channels beside x_t
    head        "hfah": x_0 by HFAH; "plain": x_0 by one convolution; "eps": ε by one convolution; "dual": both ε and
                HFAH's x_0, both supervised
    gates       of HFAH
    anchored    F1 is the first condition, and what the head for x_0 says (at first: nothing) is added to it
    """

    def __init__(
        self, channels: int, conditions: int, fold: int, head: str, gates: str, anchored: bool, **unet: Any
    ) -> None:
        super().__init__()
        self.channels, self.fold, self.head, self.anchored = channels, fold, head, anchored
        self.unet = UNet((channels + conditions) * fold**2, **unet)
        target = channels * fold**2
        widths = self.unet.channels
        self.for_clean = self.for_noise = None
        if head in ("hfah", "dual"):
            self.for_clean = AggregationHead(widths, target, gates)
        elif head == "plain":
            self.for_clean = PlainHead(widths, target, unet.get("dropout", 0.2))
        if head in ("eps", "dual"):
            self.for_noise = PlainHead(widths, target, unet.get("dropout", 0.2))
        if anchored and self.for_clean is not None:
            nn.init.zeros_(self.for_clean.leave.weight), nn.init.zeros_(self.for_clean.leave.bias)

    def forward(self, x: Tensor, conditions: Tensor, share: Tensor) -> Estimate:
        """x_t [B,c,H,W], conditions [B,·,H,W] in [-1,1], ᾱ_t [B]."""
        maps = self.unet(F.pixel_unshuffle(torch.cat([x, conditions], 1), self.fold), share.sqrt())
        noise = clean = None
        if self.for_noise is not None:
            noise = F.pixel_shuffle(self.for_noise(maps), self.fold)
        if self.for_clean is not None:
            drawn = F.pixel_shuffle(self.for_clean(maps), self.fold)
            clean = (drawn + before_tanh(conditions[:, : self.channels]) if self.anchored else drawn).tanh()
        else:
            kept = share.to(x).clamp_min(1e-6).view(-1, 1, 1, 1)
            clean = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
        return Estimate(clean, noise)


class SGDFuse(Fuser):
    """configuration      of CONFIGURATIONS; the other arguments override it
    width, heads, blocks, anchor          of Stage I, at the same fold
    base, mults, res_blocks, dropout, middle_attention      of the U-Net
    head, gates           of `Denoiser` and `AggregationHead`
    channels, conditions, start, fold, steps                see above. start "clean": one pass over F1 without noise.
                          steps 0: F1 itself, which is Stage I alone
    tau                   where "first" starts, of 1000 steps
    eta, seed             of the sampler; each image has its own generator, seeded by aux["seeds"] or by `seed`
    """

    name = "sgdfuse"
    trainer = "models.fusers.refinement:Refinement"

    def __init__(
        self,
        configuration: str = "full",
        width: int = 48,
        heads: int = 4,
        blocks: Sequence[int] = (4, 2),
        anchor: str = "blend",
        base: int = 64,
        mults: Sequence[int] = (1, 2, 4, 8),
        res_blocks: int = 2,
        dropout: float = 0.2,
        middle_attention: bool = True,
        head: str = "hfah",
        gates: str = "cbam",
        tau: int = 245,
        eta: float = 0.0,
        seed: int = 0,
        **changes: Any,
    ) -> None:
        super().__init__(
            configuration=configuration, width=width, heads=heads, blocks=list(blocks), anchor=anchor, base=base,
            mults=list(mults), res_blocks=res_blocks, dropout=dropout, middle_attention=middle_attention, head=head,
            gates=gates, tau=tau, eta=eta, seed=seed, **changes,
        )  # fmt: skip
        plan = _configured(configuration, head, changes)
        if anchor not in ("blend", *ANCHORS):
            raise UsageError(f"There is no anchor {anchor!r} in SGDFuse; choose one of blend, {', '.join(ANCHORS)}.")
        self.channels, self.conditions, self.start = plan["channels"], plan["conditions"], plan["start"]
        self.steps, self.tau, self.eta, self.seed = plan["steps"], tau, eta, seed
        self.stride = plan["fold"] * 2 ** (len(mults) - 1)
        self.first = FirstStage(width, heads, blocks, plan["fold"], self.channels, anchor)
        everything = self.conditions == "all"
        self.denoiser = Denoiser(
            self.channels, 2 + (self.channels + 2 if everything else 0), plan["fold"], head, gates, everything,
            base=base, mults=mults, blocks=res_blocks, dropout=dropout, attention=middle_attention,
        )  # fmt: skip
        zero_terminal = self.start == "noise" and head in ("hfah", "plain")  # ε says nothing about x_0 where ᾱ = 0
        self.register_buffer("shares", schedule(zero_terminal=zero_terminal), persistent=False)
        self.plan = self.shares.tolist()  # the same where reading it waits for no device

    def first_picture(self, infrared: Tensor, visible: Tensor) -> Tensor:
        """F1 [B,c,H,W] of infrared and visible, all in [-1,1], sides multiples of the stride."""
        return self.first(infrared, visible, visible if self.channels == 3 else luminance(visible))

    def conditioning(self, first: Tensor, infrared: Tensor, visible: Tensor, masks: Tensor) -> Tensor:
        """What stands beside x_t: masks [B,2,H,W] in 0..1 and, with "all", F1, infrared and luminance."""
        masks = masks * 2 - 1
        if self.conditions == "masks":
            return masks
        return torch.cat([first, infrared, luminance(visible), masks], 1)

    def refine(
        self, first: Tensor, conditions: Tensor, draws: Sequence[torch.Generator], steps: int | None = None
    ) -> Tensor:
        """F2 [B,c,H,W] in [-1,1], by `steps` (those of the configuration without it)."""
        steps = self.steps if steps is None else steps

        def estimate(x: Tensor, share: Tensor) -> Tensor:
            return self.denoiser(x, conditions, share).clean.float()

        if self.start == "clean":
            return estimate(first, torch.ones(len(first), device=first.device))
        last = self.tau if self.start == "first" else len(self.shares) - 1
        noise = noise_like(first, draws)
        start = noised(first, noise, self.shares[last].expand(len(first))) if self.start == "first" else noise
        return ddim(estimate, start, self.plan, timesteps(last, steps), draws, self.eta)

    def _fuse(self, infrared: Tensor, visible: Tensor, aux: dict[str, Any]) -> tuple[Tensor, dict]:
        height, width = infrared.shape[2:]
        empty = torch.zeros_like(infrared)
        masks = torch.cat([aux.get("mask_infrared", empty), aux.get("mask_visible", empty)], 1).to(infrared)
        infrared, visible, masks = (pad_to_stride(x, self.stride) for x in (2 * infrared - 1, 2 * visible - 1, masks))
        first = self.first_picture(infrared, visible)
        steps = aux.get("steps", self.steps)
        refined = first
        if steps:
            seeds = aux.get("seeds", [self.seed] * len(first))
            draws = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
            refined = self.refine(first, self.conditioning(first, infrared, visible, masks), draws, steps)
        refined, first = ((x[..., :height, :width].float().clamp(-1, 1) + 1) / 2 for x in (refined, first))
        if self.channels == 1:
            return refined, {"first": first}
        return luminance(refined), {"first": luminance(first), "image": refined}


def _configured(configuration: str, head: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Raises UsageError for names that do not exist."""
    if configuration not in CONFIGURATIONS:
        raise UsageError(f"There is no configuration {configuration!r}; choose one of {', '.join(CONFIGURATIONS)}.")
    plan = CONFIGURATIONS[configuration] | changes
    if unknown := sorted(set(changes) - set(CONFIGURATIONS[configuration])):
        raise UsageError(f"SGDFuse has no setting {', '.join(unknown)}; correct fuser.network.")
    for value, known in ((head, HEADS), (plan["start"], STARTS), (plan["conditions"], ("masks", "all"))):
        if value not in known:
            raise UsageError(f"There is no {value!r} in SGDFuse; choose one of {', '.join(known)}.")
    if plan["start"] == "noise" and plan["conditions"] == "masks":
        raise UsageError('From pure noise and masks alone nothing tells of the pair; set start "first" or "clean".')
    return plan
