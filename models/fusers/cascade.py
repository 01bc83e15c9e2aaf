"""SegMiF's training: fusion and segmentation, in turns or in one loop (arXiv 2308.02097).

In turns ("alternate"), a round trains fusion with the segmentation network at rest, whose loss flows into the fused
picture, and then segmentation on pictures that are fused in memory. The first round knows no segmentation yet. In one
loop ("joint") both losses make one step of both networks. Nothing is written to disk in between, the segmentation
network is in training mode exactly when it is trained, and its optimiser lives through all rounds.

Legend: B batch, H W crop; L_f loss of fusion, L_s of segmentation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.errors import UsageError
from models.fusers.colour import luminance, recolour
from models.fusers.losses import maximum_loss, own_losses, ssim, target_loss, warm_up_loss
from models.fusers.precision import autocast
from models.fusers.saliency import saliency_blend
from models.fusers.segmif import SegMiF
from models.fusers.settings import FuserSettings
from models.fusers.training import Pairs, at_rest, descend, linear_rate, set_rate, with_initial_rates
from models.fusers.weighting import Weighting
from models.losses import cross_entropy


class Cascade(nn.Module):
    """SegMiF with its losses and optimisers; `iterate` is one step of either mode."""

    def __init__(self, settings: FuserSettings, model: SegMiF) -> None:
        super().__init__()
        if settings.mode not in ("joint", "alternate") or settings.objective not in ("saliency", "maximum"):
            raise UsageError("SegMiF trains joint or alternate, towards saliency or maximum; correct fuser.mode.")
        self.settings, s, self.model = settings, settings, model
        self.weighting = Weighting(("fusion", "segmentation"), s.weighting)
        self.fused_parameters = [*model.fusion.parameters(), *self.weighting.parameters()]
        net = model.segmentation
        groups = [
            {"params": list(net.encoder.parameters()), "lr": s.rate_segmentation},
            {"params": list(net.head.parameters()), "lr": s.rate_segmentation * s.head_factor},
        ]
        fusion = torch.optim.AdamW(self.fused_parameters, s.rate_fusion, weight_decay=0.01)
        self.fusion_optimiser = with_initial_rates(fusion)
        self.segmentation_optimiser = with_initial_rates(torch.optim.AdamW(groups, weight_decay=0.01))
        weights = None if s.class_weights is None else torch.tensor(s.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def parts(self, name: str) -> dict:
        """What a checkpoint has to hold, by name."""
        return {
            name: self,
            f"{name}.fusion": self.fusion_optimiser,
            f"{name}.segmentation": self.segmentation_optimiser,
        }

    @property
    def fuser(self) -> SegMiF:
        """What was trained, ready to be saved."""
        return self.model.eval()

    def phase(self, step: int) -> tuple[str, int]:
        """("joint", 0), or what "alternate" trains at this step, "fusion" or "segmentation", and its round from 1."""
        s = self.settings
        if s.mode == "joint":
            return "joint", 0
        length = max(1, s.iterations // s.rounds)
        round, place = min(step // length, s.rounds - 1) + 1, step % length
        return ("fusion" if place < s.fusion_share * length else "segmentation"), round

    def iterate(self, pairs: Pairs, step: int) -> dict[str, Tensor]:
        """One step; returns the losses and weights of what was trained, detached."""
        phase, round = self.phase(step)
        factor = linear_rate(step, self.settings.iterations)
        set_rate(self.fusion_optimiser, factor)
        set_rate(self.segmentation_optimiser, factor)
        if phase == "joint":
            losses = self.joint_step(pairs)
        elif phase == "fusion":
            losses = self.fusion_step(pairs, round)
        else:
            losses = self.segmentation_step(pairs)
        return {name: value.detach() for name, value in losses.items()}

    def fusion_step(self, pairs: Pairs, round: int = 1) -> dict[str, Tensor]:
        """The fusion network alone: in round 1 by L_f, later also by L_s through the segmentation network at rest."""
        s = self.settings
        with at_rest(self.model.segmentation):
            fused, image = self.fuse(pairs)
            losses = {"fusion": self.fusion_loss(fused, pairs, warm_up=round == 1)}
            if round == 1:
                descend(losses["fusion"], self.fusion_optimiser)
                return losses
            losses["segmentation"] = self.segmentation_loss(image, pairs)
            weighted = self._weighted(losses, s.fusion_weight * 0.4 / round)
        descend(weighted, self.fusion_optimiser)
        return losses | self.weighting.factors

    def segmentation_step(self, pairs: Pairs) -> dict[str, Tensor]:
        """The segmentation network alone, on pictures fused in memory."""
        with torch.no_grad(), at_rest(self.model):
            _, image = self.fuse(pairs)
        self.model.segmentation.train()
        loss = self.segmentation_loss(image, pairs)
        descend(loss, self.segmentation_optimiser)
        return {"segmentation": loss}

    def joint_step(self, pairs: Pairs) -> dict[str, Tensor]:
        """Both networks by both losses; with `detach`, each by its own."""
        fused, image = self.fuse(pairs)
        self.model.segmentation.train()
        image = image.detach() if self.settings.detach else image
        losses = {"fusion": self.fusion_loss(fused, pairs), "segmentation": self.segmentation_loss(image, pairs)}
        total = self._weighted(losses, self.settings.fusion_weight)
        descend(total, self.fusion_optimiser, self.segmentation_optimiser)
        return losses | self.weighting.factors

    def _weighted(self, losses: dict[str, Tensor], fusion_weight: float) -> Tensor:
        scaled = {
            "fusion": fusion_weight * losses["fusion"],
            "segmentation": self.settings.segmentation_weight * losses["segmentation"],
        }
        return self.weighting(scaled, self.model.fusion.last.weight)

    def fuse(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The fused luminance [B,1,H,W], unclamped, and in colour [B,3,H,W], as testing has it, too."""
        model = self.model
        with autocast(pairs.infrared.device):
            with at_rest(model.segmentation):
                semantics = model.semantic_features(pairs.infrared, pairs.visible)
            fused = model.fusion(pairs.infrared, luminance(pairs.visible), semantics).float()
        return fused, recolour(fused, pairs.visible)

    def fusion_loss(self, fused: Tensor, pairs: Pairs, warm_up: bool = False) -> Tensor:
        """L_f. Towards "maximum": brightest pixel, sharpest gradient, the structure of both, what each adds."""
        y = luminance(pairs.visible)
        if self.settings.objective == "maximum":
            alike = (ssim(fused, pairs.infrared) + ssim(fused, y)) / 2
            loss = maximum_loss(fused, pairs.infrared, y) + (1 - alike)
            return loss + own_losses(fused, pairs.infrared, y, self.settings)
        target = saliency_blend(pairs.infrared, y)
        return warm_up_loss(fused, target) if warm_up else target_loss(fused, target)

    def segmentation_loss(self, image: Tensor, pairs: Pairs) -> Tensor:
        """L_s: cross-entropy over the pixels whose class is known."""
        with autocast(image.device):
            logits = self.model.segment(image)
        return cross_entropy(logits, pairs.label, self.class_weights)


class Alone(Cascade):
    """The segmentation network by itself, on whatever pictures stand in `Pairs.visible`, with the steps, rates and
    losses it has beside the fusion network: what joint training is measured against."""

    def iterate(self, pairs: Pairs, step: int) -> dict[str, Tensor]:
        set_rate(self.segmentation_optimiser, linear_rate(step, self.settings.iterations))
        self.model.segmentation.train()
        loss = self.segmentation_loss(pairs.visible.expand(-1, 3, -1, -1), pairs)
        descend(loss, self.segmentation_optimiser)
        return {"segmentation": loss.detach()}
