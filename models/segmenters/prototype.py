"""The training-free control: whose prototype is nearer, foreground's or background's?

Levels of a frozen encoder, each scaled to unit length, are concatenated; a query cell takes the class of the nearer
masked-average prototype (PANet, arXiv 1908.06391, without its training). Whatever is trained has to beat this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.segmenters.similarity import SoftMask, control_maps

FOREGROUND, BACKGROUND, NEAR_FOREGROUND, NEAR_BACKGROUND, RECTIFIED = -5, -4, -3, -2, -1
SCALE = 20.0


class Prototype(nn.Module):
    """Logits [B, 2, h, w] (background, foreground) with no parameter at all; temperature 1 / SCALE."""

    def forward(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: SoftMask) -> Tensor:
        """query levels [B, c, h', w'] and support levels [B, K, c, h', w'] of any stride; h x w is the masks' grid."""
        return SCALE * control_maps(query, support, mask)[:, [1, 0]]

    @staticmethod
    def from_evidence(maps: Tensor) -> Tensor:
        return SCALE * torch.stack([maps[:, BACKGROUND], maps[:, FOREGROUND]], 1)
