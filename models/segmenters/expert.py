"""One fold's model: the base learner, the meta learners and their fusion, over frozen features.

Legend: B episodes, K supports, V streams, H x W canvas, h x w grid of stride 8, C = 1 + base classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from models import LEARNERS, find
from models.backbone import Features, Wants
from models.errors import UsageError
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.fusion import FORMS, EnsembleOut, FusionEnsemble
from models.segmenters.metric import Shown
from models.segmenters.msanet import MSANetSettings
from models.segmenters.prototype import Prototype
from models.segmenters.pspnet import PSPNet, base_map
from models.segmenters.similarity import soft_mask
from models.views import PSEUDO


@dataclass(frozen=True)
class ExpertSettings:
    """base_width: hidden channels of the base learner (512 in the paper). learner: name in LEARNERS; `anchored` for few
    base classes, `msanet` for many. anchored, msanet: the settings of each. fusion: "F1" or "F2". gamma: F2's first
    weight of the base map. use_base: False leaves the base map out (P_b = 0)."""

    base_width: int = 512
    learner: str = "anchored"
    anchored: AnchoredSettings = field(default_factory=AnchoredSettings)
    msanet: MSANetSettings = field(default_factory=MSANetSettings)
    fusion: str = "F2"
    gamma: float = 0.05
    use_base: bool = True

    def __post_init__(self) -> None:
        if self.fusion not in FORMS:
            raise UsageError(f"There is no fusion {self.fusion!r}; choose {' or '.join(FORMS)}.")
        find(LEARNERS, self.learner)

    @property
    def wants(self) -> Wants:
        """What the learner needs from the encoder beside the three levels."""
        return find(LEARNERS, self.learner).wants(self.own)

    @property
    def own(self) -> Any:
        """The learner's own settings; None for one from outside."""
        return getattr(self, self.learner, None)


def stored_settings(stored: Mapping[str, Any]) -> ExpertSettings:
    """The settings that a model's config.json holds; lists become tuples again.

    Models of version 0.1.0 had one kind of learner, and its settings under `learner`.
    """
    if isinstance(stored["learner"], Mapping):
        stored = {**stored, "learner": "anchored", "anchored": stored["learner"]}
    kinds = {"anchored": AnchoredSettings, "msanet": MSANetSettings}
    given = {f.name: stored[f.name] for f in fields(ExpertSettings) if f.name in stored}
    for name in kinds.keys() & given.keys():
        given[name] = kinds[name](**{**given[name], "rates": tuple(given[name]["rates"])})
    return ExpertSettings(**given)


class Expert(nn.Module):
    """channels: widths of the encoder's levels; base_classes: label ids, in the order of the base learner's logits.

    blocks: widths of the encoder's block maps; shots: K of training.
    """

    def __init__(
        self, channels: Sequence[int], base_classes: Sequence[int], streams: int, settings: ExpertSettings,
        blocks: Sequence[int] = (), shots: int = 1,
    ) -> None:
        super().__init__()
        self.base_classes, self.use_base = tuple(base_classes), settings.use_base
        self.base = PSPNet(tuple(channels), len(base_classes), settings.base_width)
        learner = find(LEARNERS, settings.learner)
        learners = [learner(tuple(channels), settings.own, blocks, shots) for _ in range(streams)]
        self.ensemble = FusionEnsemble(learners, settings.fusion, settings.gamma)

    def forward(
        self, query: Sequence[Features], support: Sequence[Features], masks: Tensor, own: Tensor | None = None,
        base: Tensor | None = None,
    ) -> EnsembleOut:
        """query: V entries of levels [B, c, h', w']; support: V entries of [B, K, c, h', w']; masks uint8 [B, K, H, W].

        own [B]: index of the episode's class among the base classes (from 1; 0: none), left out of P_b in training.
        base [B, C, h, w]: the base learner's logits of the first stream's query, where they are known already.
        """
        query, support = ([Features(*levels) for levels in side] for side in (query, support))
        grid = tuple(query[0].low.shape[-2:])
        return self.ensemble(query, support, soft_mask(masks, grid), self.base_share(query[0], grid, own, base))

    @property
    def reads_evidence_alone(self) -> bool:
        """Whether `decide` can take the place of the forward."""
        return all(hasattr(one, "from_evidence") and not one.raw_width for one in self.ensemble.learners)

    @property
    def every_level(self) -> bool:
        """Whether its evidence holds maps of single levels."""
        return any(one.correct is not None for one in self.ensemble.learners)

    @property
    def measures(self) -> bool:
        """Whether `decide` needs what the supports show beside evidence: a learner has a metric of its own."""
        return any(getattr(one, "metric", None) is not None for one in self.ensemble.learners)

    def decide(self, maps: Tensor, psi: Tensor, base: Tensor, shown: Shown | None = None) -> EnsembleOut:
        """The second half of the forward, from evidence [B, V, E, h, w], ψ [B, V] and P_b [B, 1, h, w]; shown: for
        those that measure."""
        learners = list(self.ensemble.learners)
        measured = [None] * len(learners)
        if shown is not None:
            sides = zip(learners, shown.query, shown.support, strict=True)
            measured = [one.measure(query, support, shown.mask) for one, query, support in sides]
        pairs = enumerate(zip(learners, measured, strict=True))
        streams = torch.stack([one.from_evidence(maps[:, v], base, None, margin) for v, (one, margin) in pairs], 1)
        control = torch.stack([Prototype.from_evidence(maps[:, v]) for v in range(maps.shape[1])], 1)
        return EnsembleOut(self.ensemble.fusion(streams, psi, base), streams, psi, control)

    @torch.no_grad()
    def base_logits(self, features: Features, grid: tuple[int, int]) -> Tensor:
        """[B, C, h, w]; frozen, in eval mode."""
        return self.base.eval()(features, grid)

    def base_share(
        self, features: Features, grid: tuple[int, int], own: Tensor | None = None, base: Tensor | None = None
    ) -> Tensor:
        """P_b [B, 1, h, w] of the first stream."""
        if not self.use_base:
            return features.low.new_zeros(len(features.low), 1, *grid)
        return base_map(self.base_logits(features, grid) if base is None else base, own)

    def own_index(self, labels: Sequence[int]) -> Tensor:
        """[B] long: where each class stands among the base classes, from 1; 0 for a class that is not one of them, and
        -1 for a pseudo-class, which may be any of them."""
        place = {label: n for n, label in enumerate(self.base_classes, start=1)} | {PSEUDO: -1}
        return torch.tensor([place.get(label, 0) for label in labels])
