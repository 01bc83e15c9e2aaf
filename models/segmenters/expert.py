"""One fold's model: the base learner, the meta learners and their fusion, over frozen features.

Legend: B episodes, K supports, V streams, H x W canvas, h x w grid of stride 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.backbone import Features
from models.errors import UsageError
from models.segmenters.fusion import FORMS, EnsembleOut, FusionEnsemble
from models.segmenters.msanet import MetaLearnerSettings
from models.segmenters.pspnet import PSPNet, base_map
from models.segmenters.similarity import soft_mask, to_grid


@dataclass(frozen=True)
class ExpertSettings:
    """base_width: hidden channels of the base learner (512 in the paper). fusion: "F1" or "F2". gamma: F2's first
    weight of the base map. use_base: False leaves the base map out (P_b = 0)."""

    base_width: int = 512
    learner: MetaLearnerSettings = field(default_factory=MetaLearnerSettings)
    fusion: str = "F2"
    gamma: float = 0.05
    use_base: bool = True

    def __post_init__(self) -> None:
        if self.fusion not in FORMS:
            raise UsageError(f"There is no fusion {self.fusion!r}; choose {' or '.join(FORMS)}.")


class Expert(nn.Module):
    """channels: widths of the encoder's levels; base_classes: label ids, in the order of the base learner's logits."""

    def __init__(
        self, channels: Sequence[int], base_classes: Sequence[int], streams: int, settings: ExpertSettings
    ) -> None:
        super().__init__()
        self.base_classes, self.use_base = tuple(base_classes), settings.use_base
        self.base = PSPNet(tuple(channels), len(base_classes), settings.base_width)
        self.ensemble = FusionEnsemble(tuple(channels), streams, settings.learner, settings.fusion, settings.gamma)

    def forward(
        self, query: Sequence[Features], support: Sequence[Features], masks: Tensor, own: Tensor | None = None
    ) -> EnsembleOut:
        """query: V entries of levels [B, c, h', w']; support: V entries of [B, K, c, h', w']; masks uint8 [B, K, H, W].

        own [B]: index of the episode's class among the base classes (from 1; 0: none), left out of P_b in training.
        """
        grid = tuple(query[0].low.shape[-2:])
        base = self.base_share(query[0], grid, own)
        levels = [torch.stack(level, 1) for level in zip(*(to_grid(q, grid) for q in query), strict=True)]
        shown = [torch.stack(level, 2) for level in zip(*(to_grid(s, grid) for s in support), strict=True)]
        return self.ensemble(levels, shown, soft_mask(masks, grid), base)

    @torch.no_grad()
    def base_share(self, features: Features, grid: tuple[int, int], own: Tensor | None = None) -> Tensor:
        """P_b [B, 1, h, w] of the first stream; frozen, in eval mode."""
        if not self.use_base:
            return features.low.new_zeros(len(features.low), 1, *grid)
        return base_map(self.base.eval()(features, grid), own)

    def own_index(self, labels: Sequence[int]) -> Tensor:
        """[B] long: where each class stands among the base classes, from 1; 0 for a class that is not one of them."""
        return torch.tensor([self.base_classes.index(c) + 1 if c in self.base_classes else 0 for c in labels])
