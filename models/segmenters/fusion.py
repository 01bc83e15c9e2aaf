"""The fusion ensemble: meta learners of several modalities and one base learner agree on a mask.

GenFusion (arXiv 2412.05341) re-weights the meta learners' foreground and background maps and joins the modalities; its
exact formula is not public. Two forms are offered (GenFusion spec §4): F1 is linear and reduces to BAM's ensemble
(arXiv 2203.07615 eq. 9-12) for one modality; F2 pools in the log domain with a gate and starts as plain averaging.

Legend: B episodes, K supports, V modality streams, h x w cells. Logits and probabilities are (background, foreground).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.backbone import Features
from models.segmenters.similarity import SoftMask

TINY = 1e-6
FORMS = ("F1", "F2")


class EnsembleOut(NamedTuple):
    """Logits: final [B, 2, h, w], streams [B, V, 2, h, w], and control [B, V, 2, h, w] of the training-free prototype
    on the same features; psi [B, V]."""

    final: Tensor
    streams: Tensor
    psi: Tensor
    control: Tensor


class LinearFusion(nn.Module):
    """F1: a^c = Σ_v α_v p_v^c + Σ_v β_v ψ_v; foreground a^1, background v1·a^0 + v2·P_b (spec §4.1).

    α starts at 1/V and β at 0, (v1, v2) at (1, 0). Scores are in about 0..1, which cross-entropy then has to
    stretch, as in BAM; at the start the decision is the mean of the streams.
    """

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((streams,), 1 / streams))
        self.style = nn.Parameter(torch.zeros(streams))
        self.background = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, streams: Tensor, psi: Tensor, base: Tensor) -> Tensor:
        pooled = torch.einsum("bvchw,v->bchw", streams.softmax(2), self.share)
        pooled = pooled + (psi @ self.style)[:, None, None, None]
        background = self.background[0] * pooled[:, :1] + self.background[1] * base
        return torch.cat([background, pooled[:, 1:]], 1)


class GatedFusion(nn.Module):
    """F2: geometric pooling of experts; background is "meta background" or "some base object" (spec §4.2).

    g_v = softmax_v(b_v - a·H(p_v) - d·ψ_v) with binary entropy H; ℓ^c = τ Σ_v g_v log p_v^c; z^1 = ℓ^1,
    z^0 = logaddexp(ℓ^0, log γ + log P_b). b, a, d start at 0 (equal shares), τ at 1, γ at `gamma`.
    """

    def __init__(self, streams: int, gamma: float = 0.05) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(streams))
        self.entropy = nn.Parameter(torch.zeros(()))
        self.style = nn.Parameter(torch.zeros(()))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.gamma = nn.Parameter(torch.tensor(gamma).expm1().log())

    def forward(self, streams: Tensor, psi: Tensor, base: Tensor) -> Tensor:
        log_share = streams.log_softmax(2)
        entropy = -(log_share.exp() * log_share).sum(2)
        scores = self.bias.view(1, -1, 1, 1) - self.entropy * entropy - self.style * psi[:, :, None, None]
        gate = scores.softmax(1)[:, :, None]
        pooled = self.temperature.exp() * (gate * log_share).sum(1)
        objects = softplus(self.gamma).log() + (base + TINY).log()
        return torch.cat([torch.logaddexp(pooled[:, :1], objects), pooled[:, 1:]], 1)


class FusionEnsemble(nn.Module):
    """V meta learners (of `models.LEARNERS`) and their fusion; the base map comes from outside, frozen.

    form: "F1" or "F2"; gamma: F2's first weight of the base map.
    """

    def __init__(self, learners: Sequence[nn.Module], form: str = "F2", gamma: float = 0.05) -> None:
        super().__init__()
        self.learners = nn.ModuleList(learners)
        self.fusion = LinearFusion(len(learners)) if form == "F1" else GatedFusion(len(learners), gamma)

    def forward(
        self, query: Sequence[Features], support: Sequence[Features], mask: SoftMask, base: Tensor
    ) -> EnsembleOut:
        """query: V entries of levels [B, c, h', w'], support of [B, K, c, h', w']; base map [B, 1, h, w]."""
        streams = zip(self.learners, query, support, strict=True)
        outs = [learner(asked, shown, mask, base) for learner, asked, shown in streams]
        logits, psi, control = (torch.stack(parts, 1) for parts in zip(*outs, strict=True))
        return EnsembleOut(self.fusion(logits, psi, base), logits, psi, control)
