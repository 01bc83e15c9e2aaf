"""MSANet (arXiv 2206.09667), on the meta learner of BAM (arXiv 2203.07615 §3.3); GenFusion spec §3.3.

What the support shows meets the query in five ways: a masked-average prototype tiled over the query, a prior map of
nearest-support similarity, similarities of every encoder block, the support's own features weighed by attention, and ψ,
the distance of Gram matrices, which weighs the shots and later the streams. An ASPP decoder makes a mask of them. With
`multi_sim` and `gam` off this is BAM's meta learner.

Two things are not as released: the order of the shots is undone exactly (`ShotWeights`), and the batch normalisation
behind the block similarities, frozen at mean 0 and variance 1 there, is the affine map that it amounts to.

Legend: B episodes, K supports, h x w cells, c channels, width = 256 in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from models.backbone import Features, Wants
from models.errors import UsageError
from models.segmenters.prototype import Prototype
from models.segmenters.similarity import (
    EPSILON,
    Places,
    SoftMask,
    multi_similarity,
    object_places,
    prior_maps,
    style_discrepancy,
)

PRIORS = ("masked_l3", "masked_l4")
POOLS = ("all", "area")


@dataclass(frozen=True)
class MSANetSettings:
    """prior: support features of the prior map, masked before the last level (`masked_l3`, BAM) or after (`masked_l4`,
    MSANet). multi_sim, gam: the similarities of encoder blocks and the attention, MSANet's additions to BAM. gam_pool:
    attention looks at the mean over the object (`area`) or, as released, over all cells (`all`), which is weak for
    small objects. similarity_width: channels made of the block similarities. rates: dilations of the decoder's 3x3
    branches. dropout: of reduced features and of attention."""

    width: int = 256
    prior: str = "masked_l4"
    multi_sim: bool = True
    gam: bool = True
    gam_pool: str = "area"
    similarity_width: int = 64
    rates: tuple[int, ...] = (6, 12, 18)
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name, known in (("prior", PRIORS), ("gam_pool", POOLS)):
            if getattr(self, name) not in known:
                raise UsageError(f"There is no {name} {getattr(self, name)!r}; choose {' or '.join(known)}.")


class MSANet(nn.Module):
    """One stream's meta learner.

    channels: widths of the encoder's (low, mid, high). blocks: widths of its block maps. shots: K of training; asked
    with another K the shots count the same.
    """

    def __init__(
        self, channels: tuple[int, int, int], settings: MSANetSettings, blocks: Sequence[int] = (), shots: int = 1
    ) -> None:
        super().__init__()
        self.settings, self.blocks = settings, tuple(blocks)
        width, inside = settings.width, channels[0] + channels[1]
        self.reduce_query, self.reduce_support = (nn.Conv2d(inside, width, 1, bias=False) for _ in range(2))
        self.drop = nn.Dropout2d(settings.dropout)
        self.shots = ShotWeights(shots)
        merged = 2 * width + 1
        if settings.multi_sim:
            self.similarities = nn.Conv2d(len(self.blocks), settings.similarity_width, 1)
            merged += settings.similarity_width
        if settings.gam:
            self.attention = Attention(width, settings.gam_pool, settings.dropout)
            merged += width
        self.merge = nn.Conv2d(merged, width, 1, bias=False)
        self.decoder = Decoder(width, settings.rates)

    @staticmethod
    def wants(settings: MSANetSettings) -> Wants:
        return Wants(blocks=settings.multi_sim, masked=settings.prior == "masked_l3")

    def forward(self, query: Features, support: Features, mask: SoftMask, base: Tensor) -> tuple:
        """Logits [B, 2, h, w], ψ [B], and logits [B, 2, h, w] of the training-free control.

        query levels [B, c, h', w'], support levels [B, K, c, h', w'], and what `wants` asked for; the base map
        [B, 1, h, w] joins in the ensemble alone.
        """
        grid = tuple(query.low.shape[-2:])
        with torch.no_grad():
            psi = style_discrepancy(query.low, support.low)
            places = object_places(mask.foreground)
            prior = prior_maps(_stretched(query.high, grid), _stretched(self._shown_high(support), grid), places)
            control = Prototype()(query[:3], support[:3], mask)
        share = self.shots(psi)
        with torch.autocast(psi.device.type, torch.bfloat16, enabled=_fast(psi.device)):
            asked = self._reduced(self.reduce_query, query, grid)
            shown = self._reduced(self.reduce_support, support, grid)
            tiled = torch.einsum("bkc,bk->bc", prototypes(shown, mask.foreground), share)
            parts = [asked, tiled[:, :, None, None].expand_as(asked)]
            parts.append(torch.einsum("bkhw,bk->bhw", prior, share)[:, None])
            if self.settings.multi_sim:
                parts.append(self._similarities(query, support, places, grid))
            if self.settings.gam:
                parts.append(self.attention(shown, mask.foreground))
            logits = self.decoder(self.merge(torch.cat(parts, 1)).relu())
        return logits.float(), (share * psi).sum(1), control

    def _shown_high(self, support: Features) -> Tensor:
        return support.masked if self.settings.prior == "masked_l3" else support.high

    def _reduced(self, reduce: nn.Conv2d, features: Features, grid: tuple[int, int]) -> Tensor:
        """F [.., width, h, w] of the mid and the low level."""
        levels = torch.cat([_stretched(features.mid, grid), features.low], -3)
        lead = levels.shape[:-3]
        return self.drop(reduce(levels.flatten(0, -4)).relu()).unflatten(0, lead)

    def _similarities(self, query: Features, support: Features, places: Places, grid: tuple[int, int]) -> Tensor:
        with torch.no_grad():
            maps = multi_similarity(query.blocks, support.blocks, self.blocks, places).unflatten(2, grid)
        return self.similarities(maps).relu()


def prototypes(support: Tensor, weight: Tensor) -> Tensor:
    """Masked average [B, K, c] of each shot: Σ f·m / (Σ m + 5e-4). support [B, K, c, h, w], weight [B, K, h, w]."""
    return torch.einsum("bkchw,bkhw->bkc", support.float(), weight) / (weight.sum((2, 3))[..., None] + EPSILON)


class ShotWeights(nn.Module):
    """w [B, K] from ψ [B, K], in the order given: sort, two layers, undo the sorting, softmax (BAM's `kshot_rw`).

    The released MSANet undoes it with the identity, so that there the weights depend on the order of the shots.
    """

    def __init__(self, shots: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(shots, 2), nn.ReLU(), nn.Linear(2, shots)) if shots > 1 else None
        self.count = shots

    def forward(self, psi: Tensor) -> Tensor:
        if self.layers is None or psi.shape[1] != self.count:
            return torch.full_like(psi, 1 / psi.shape[1])
        rising, order = psi.sort(1)
        return torch.zeros_like(psi).scatter(1, order, self.layers(rising)).softmax(1)


class Attention(nn.Module):
    """GAM: the support's features, their channels weighed by what the object shows of them (MSANet §3.3).

    g_k = σ(dropout(W2 ReLU(W1 pool(m_k ⊙ F_k)))), mean over k of g_k ⊙ F_k; not aligned with the query, as published.
    """

    def __init__(self, width: int, pool: str, dropout: float) -> None:
        super().__init__()
        self.pool = pool
        self.gate = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Dropout(dropout),
            nn.Sigmoid(),
        )

    def forward(self, support: Tensor, foreground: Tensor) -> Tensor:
        """[B, width, h, w] of support features [B, K, width, h, w] and masks [B, K, h, w]."""
        pooled = prototypes(support, foreground)
        if self.pool == "all":
            pooled = pooled * (foreground.sum((2, 3)) + EPSILON)[..., None] / foreground[0, 0].numel()
        return (self.gate(pooled)[..., None, None] * support).mean(1)


class Decoder(nn.Module):
    """ASPP without batch normalisation, one residual block, two logits (BAM `ASPP`, `res1`, `res2`, `cls_meta`)."""

    def __init__(self, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.pool, self.point = (nn.Conv2d(width, width, 1) for _ in range(2))
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=r, dilation=r) for r in rates)
        self.join = nn.Conv2d(width * (2 + len(rates)), width, 1, bias=False)
        first, second, last = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3))
        self.refine = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.classify = nn.Sequential(last, nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(width, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(adaptive_avg_pool2d(x, 1)).relu().expand_as(x)
        branches = [layer(x).relu() for layer in (self.point, *self.branches)]
        x = self.join(torch.cat([pooled, *branches], 1)).relu()
        return self.classify(x + self.refine(x))


def _stretched(level: Tensor, grid: tuple[int, int]) -> Tensor:
    """[.., c, h', w'] on the grid."""
    if level.shape[-2:] == grid:
        return level
    flat = interpolate(level.flatten(0, -4), grid, mode="bilinear", align_corners=False)
    return flat.unflatten(0, level.shape[:-3])


def _fast(device: torch.device) -> bool:
    """Whether the learnt part runs in bfloat16: on a CUDA device that has it, and where the caller says so."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return able or torch.is_autocast_enabled(device.type)
