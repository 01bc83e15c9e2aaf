"""A meta learner for few base classes: from what the support shows to a mask, starting as the training-free control.

Prototype, prior and multi-similarity as in BAM (arXiv 2203.07615 §3.3) and MSANet (arXiv 2206.09667 §3), which stands
in `msanet.py`. Two things differ from the papers, because with a handful of base classes their decoder memorises them:

- the output is `anchor + correction`. The anchor weighs two margins of foreground over background, of prototypes and of
  nearest cells, and a threshold: it starts as the training-free `Prototype` control. The margin of a learnt metric
  (`metric.py`) may be added, and a correction; both start at exactly zero. Training moves away from the control, and
  model selection on held-out base classes may send it back;
- similarities go through an ASPP decoder, and raw query features are a setting (`raw_width`), off by default:
  similarities say nothing about which class it is.

Legend: B episodes, K supports, E evidence maps, h x w cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from models.backbone import LEVELS, Features, Wants
from models.errors import UsageError
from models.segmenters.metric import LearntMetric
from models.segmenters.prototype import BACKGROUND, FOREGROUND, NEAR_BACKGROUND, NEAR_FOREGROUND, SCALE, Prototype
from models.segmenters.similarity import SoftMask, evidence, prototype, style_discrepancy, to_grid

STEP = 0.1
"""Of the threshold. Margins are of the order 0.1: without it one step of Adam would leap over all useful thresholds."""


@dataclass(frozen=True)
class AnchoredSettings:
    """width: channels of the decoder (256 in the papers). raw_width: channels of reduced query features and of the
    tiled prototype (256 in the papers, 0 leaves both out). rates: dilations of the decoder's 3x3 branches.
    dropout: share of evidence maps dropped as a whole in training. correction: False keeps only the anchor, which has
    no use for raw features. metric: channels of each level in a learnt metric, whose margin joins the anchor's; 0
    leaves it out."""

    width: int = 32
    raw_width: int = 0
    rates: tuple[int, ...] = (1, 3, 6)
    dropout: float = 0.1
    correction: bool = True
    metric: int = 0

    def __post_init__(self) -> None:
        if self.raw_width and not self.correction:
            raise UsageError("Only the correction reads raw features; set correction=true or raw_width=0.")


class Anchored(nn.Module):
    """One stream's meta learner. channels: widths of the encoder's (low, mid, high); the rest is every learner's."""

    def __init__(
        self, channels: tuple[int, int, int], settings: AnchoredSettings, blocks: Sequence[int] = (), shots: int = 1
    ) -> None:
        super().__init__()
        maps = 5 * (len(channels) + 1)
        self.raw_width = settings.raw_width
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.threshold = nn.Parameter(torch.zeros(()))
        self.metric = LearntMetric(channels, settings.metric) if settings.metric else None
        if self.metric:
            self.trust = nn.Parameter(torch.zeros(()))
        if self.raw_width:
            self.reduce = nn.Conv2d(channels[1] + channels[2], self.raw_width, 1, bias=False)
        self.correct = _Decoder(maps + 1 + 2 * self.raw_width, settings) if settings.correction else None

    @staticmethod
    def wants(settings: AnchoredSettings) -> Wants:
        return LEVELS

    def forward(self, query: Features, support: Features, mask: SoftMask, base: Tensor) -> tuple:
        """Logits [B, 2, h, w], ψ [B], and logits [B, 2, h, w] of the training-free control on the same evidence.

        query levels [B, c, h', w'], support levels [B, K, c, h', w'], base map [B, 1, h, w].
        """
        grid = tuple(query.low.shape[-2:])
        shown = to_grid(support[:3], grid)
        maps = evidence(query[:3], shown, mask, every_level=self.correct is not None)
        psi = style_discrepancy(to_grid(query[:1], grid)[0], shown[0]).mean(1)
        raw = self._raw(to_grid(query[:3], grid), shown, mask) if self.raw_width else None
        logits = self.from_evidence(maps, base, raw, self.measure(query, support, mask))
        return logits, psi, Prototype.from_evidence(maps)

    def measure(self, query: Features, support: Features, mask: SoftMask) -> Tensor | None:
        """The learnt metric's margin [B, h, w] of features as in `forward`; None where there is no such metric."""
        return self.metric(query, support, mask) if self.metric else None

    def from_evidence(
        self, maps: Tensor, base: Tensor, raw: Tensor | None = None, measured: Tensor | None = None
    ) -> Tensor:
        """Logits [B, 2, h, w] from evidence [B, E, h, w] and base map; from raw maps [B, 2·raw_width, h, w] and the
        learnt metric's margin [B, h, w] where they are used."""
        score = self.anchor(maps)
        if measured is not None:
            score = score + SCALE * (self.trust * measured)[:, None]
        if self.correct is not None:
            score = score + self.correct(torch.cat([maps, base] if raw is None else [maps, base, raw], 1))
        return torch.cat([-score / 2, score / 2], 1)

    def anchor(self, maps: Tensor) -> Tensor:
        """Score [B, 1, h, w] = SCALE·(mix · margins - STEP·threshold); at the start exactly the control's."""
        prototypes = maps[:, FOREGROUND] - maps[:, BACKGROUND]
        cells = maps[:, NEAR_FOREGROUND] - maps[:, NEAR_BACKGROUND]
        return SCALE * (self.mix[0] * prototypes + self.mix[1] * cells - STEP * self.threshold)[:, None]

    def _raw(self, query: list[Tensor], support: list[Tensor], mask: SoftMask) -> Tensor:
        reduced = self.reduce(torch.cat(query[1:], 1)).relu()
        shown = self.reduce(torch.cat(support[1:], 2).flatten(0, 1)).relu().unflatten(0, support[0].shape[:2])
        tiled = prototype(shown, mask.foreground)[:, :, None, None].expand_as(reduced)
        return torch.cat([reduced, normalize(tiled, dim=1)], 1)


class _Decoder(nn.Module):
    """Merge, ASPP without batch normalisation (BAM `ASPP`), one residual block, one map; starts at zero."""

    def __init__(self, inside: int, settings: AnchoredSettings) -> None:
        super().__init__()
        width = settings.width
        self.drop = nn.Dropout2d(settings.dropout)
        self.merge = nn.Conv2d(inside, width, 1)
        self.pool = nn.Conv2d(width, width, 1)
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=r, dilation=r) for r in settings.rates)
        self.join = nn.Conv2d(width * (2 + len(settings.rates)), width, 1)
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.refine = nn.Sequential(first, nn.ReLU(), second)
        self.out = nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.merge(self.drop(x)).relu()
        pooled = self.pool(adaptive_avg_pool2d(x, 1)).relu().expand_as(x)
        x = self.join(torch.cat([x, pooled, *(branch(x).relu() for branch in self.branches)], 1)).relu()
        return self.out((x + self.refine(x)).relu())
