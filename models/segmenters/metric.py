"""A learnt metric: prototypes of the support compared with the query after a projection of each level.

Prototypical networks (Snell et al., arXiv 1703.05175) on pixels, as in PANet (arXiv 1908.06391): cosine to the
masked-average prototypes of foreground and background, in a space that training moves. Frozen features of ImageNet tell
dogs from cars; of what infrared objects have in common and differ in they know little. With nine base classes such a
space carries over to others; with five it remembers them (see `thermofuse study ablation`).

Legend: B episodes, K supports, c channels of a level, d of its projection, h x w cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.backbone import Features
from models.segmenters.similarity import SoftMask, prototype, stretch

PACE = 0.015
"""Of the projections. Their entries are of the order 0.1 where margins are weighed by numbers around 1: one rate of
learning serves both."""


class Shown(NamedTuple):
    """What a learnt metric reads of a batch on V streams: V of levels [B, c, h', w'], V of [B, K, c, h', w'], masks."""

    query: list[Features]
    support: list[Features]
    mask: SoftMask


class LearntMetric(nn.Module):
    """Starts as an orthogonal projection of each level to d = min(width, c) channels, in which cosines are roughly what
    they were; exactly so where d = c."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        for level, c in enumerate(channels):
            self.register_buffer(f"start{level}", nn.init.orthogonal_(torch.empty(min(width, c), c)))
        self.moved = nn.ParameterList(nn.Parameter(torch.zeros(min(width, c), c)) for c in channels)

    def forward(self, query: Features, support: Features, mask: SoftMask) -> Tensor:
        """Margin [B, h, w] in -2..2: cosine to the foreground prototype less that to the background's.

        query levels [B, c, h', w'], support levels [B, K, c, h', w'] at any stride; h x w is the masks' grid.
        """
        asked = self._project(query, mask)
        shown = self._project(support, mask)
        sides = [normalize(prototype(shown, weight), dim=1) for weight in mask]
        return torch.einsum("bdhw,bd->bhw", asked, sides[0] - sides[1])

    def _project(self, levels: Features, mask: SoftMask) -> Tensor:
        """Unit vectors [.., Σ d, h, w].

        Stretching is linear: levels are projected where they are small, and divided by their length where they are not.
        """
        grid, projected = tuple(mask.foreground.shape[-2:]), []
        for level, (x, moved) in enumerate(zip(levels[:3], self.moved, strict=True)):
            matrix = getattr(self, f"start{level}") + PACE * moved
            with torch.no_grad():
                length = torch.linalg.vector_norm(stretch(x, grid), dim=-3, keepdim=True).clamp_(min=1e-12)
            projected.append(stretch((matrix @ x.flatten(-2)).unflatten(-1, x.shape[-2:]), grid) / length)
        return normalize(torch.cat(projected, -3), dim=-3)
