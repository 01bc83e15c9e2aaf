"""What episodes look like to the experts, each picture, prototype and similarity worked out once.

Learners that read similarity maps alone (`Expert.reads_evidence_alone`) find those maps on the desk when the episode
comes again: another step, another copy of the learner, another variant of a study. Learners that read more are given
features, which the bank remembers. The answer is the same either way.

Legend: B episodes, K supports, V streams, E evidence maps, H x W canvas, h x w grid of stride 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.episode import EpisodeKey
from models.segmenters.episodes import BaseMemory, Batch, gather, levels_of
from models.segmenters.expert import Expert
from models.segmenters.fusion import EnsembleOut
from models.segmenters.metric import Shown
from models.segmenters.pspnet import base_map
from models.segmenters.similarity import evidence, soft_mask, style_discrepancy, to_grid
from models.views import FeatureBank, episode_mask


class Evidence(NamedTuple):
    """maps [B, V, E, h, w], ψ [B, V], P_b [B, 1, h, w], own [B]; targets uint8 [V, B, H, W]; shown: for experts that
    measure."""

    maps: Tensor
    psi: Tensor
    base: Tensor
    own: Tensor
    targets: Tensor
    shown: Shown | None = None


class Question(NamedTuple):
    """A batch of features with the base learner's logits [B, C, h, w] (or None) and own [B]."""

    batch: Batch
    base: Tensor | None
    own: Tensor

    @property
    def targets(self) -> Tensor:
        return self.batch.targets


class _Shelf:
    """What is kept while `budget` bytes last."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self.held: dict[tuple, object] = {}

    def keep(self, key: tuple, value: object, size: int) -> None:
        if self.bytes + size <= self.budget:
            self.held[key], self.bytes = value, self.bytes + size


class Desk:
    """Episodes of one bank, laid out for experts. budget: bytes of evidence kept."""

    def __init__(self, bank: FeatureBank, budget: int = 4 << 30) -> None:
        self.bank, self.memory, self.shelf = bank, BaseMemory(), _Shelf(budget)

    def beside(self) -> Desk:
        """A desk for other base learners: pictures and evidence are shared, base maps are not."""
        other = Desk(self.bank)
        other.shelf = self.shelf
        return other

    def lay(
        self, expert: Expert, fold: int, episodes: Sequence[EpisodeKey], layers: Sequence[str],
        novel: Sequence[int] = (), policy: str = "ignore",
    ) -> Evidence | Question:
        """What `expert` reads of `episodes`, stream v from layers[v], for `answer`. novel, policy: see `gather`."""
        own = expert.own_index([e.label for e in episodes]).to(self.bank.device)
        if expert.reads_evidence_alone:
            return self._evidence(expert, fold, episodes, layers, novel, policy, own)
        batch = gather(self.bank, episodes, layers, novel, policy)
        base = self.memory.logits(expert, fold, [(e.query, layers[0]) for e in episodes], batch.query[0])
        return Question(batch, base, own)

    def ask(self, expert: Expert, fold: int, *episodes) -> tuple[EnsembleOut, Tensor]:
        """The expert's answers, and the targets [V, B, H, W]; arguments of `lay`."""
        laid = self.lay(expert, fold, *episodes)
        return answer(expert, laid), laid.targets

    def _evidence(self, expert, fold, episodes, layers, novel, policy, own) -> Evidence:
        shown = (layers[0], tuple(novel), policy)
        read = [[self._read(expert.every_level, e, layer, *shown) for layer in layers] for e in episodes]
        maps, psi = (torch.stack([torch.stack([pair[n] for pair in row]) for row in read]) for n in (0, 1))
        targets = [[self._mask(e.query, e.label, layer, novel, policy) for e in episodes] for layer in layers]
        stacked = torch.stack([torch.stack(row) for row in targets]).to(self.bank.device)
        measured = self._shown(episodes, layers, *shown) if expert.measures else None
        return Evidence(maps, psi, self._base(expert, fold, episodes, layers[0], own), own, stacked, measured)

    def _shown(self, episodes: Sequence[EpisodeKey], layers: Sequence[str], shown: str, novel, policy) -> Shown:
        masks = torch.stack([self._shots(e, shown, novel, policy) for e in episodes])
        return Shown(*levels_of(self.bank, episodes, layers), soft_mask(masks.to(self.bank.device), self.bank.grid))

    def _shots(self, e: EpisodeKey, shown: str, novel: Sequence[int], policy: str) -> Tensor:
        """Masks [K, H, W] of the supports."""
        return torch.stack([self._mask(id, e.label, shown, novel, policy) for id in e.supports])

    @torch.no_grad()
    def _read(self, every_level: bool, e: EpisodeKey, layer: str, shown: str, novel, policy) -> tuple[Tensor, Tensor]:
        """Evidence [E, h, w] and ψ [] of one episode on one layer; masks are those of the layer `shown`."""
        key = (e.label, e.query, e.supports, layer, shown, novel, policy, every_level)
        if key in self.shelf.held:
            return self.shelf.held[key]
        levels = self.bank.get([(id, layer) for id in (e.query, *e.supports)])[:3]
        query = [level[:1] for level in levels]
        support = to_grid([level[1:][None] for level in levels], self.bank.grid)
        masks = self._shots(e, shown, novel, policy)[None]
        maps = evidence(query, support, soft_mask(masks.to(self.bank.device), self.bank.grid), every_level)[0]
        found = maps, style_discrepancy(to_grid(query[:1], self.bank.grid)[0], support[0]).mean(1)[0]
        self.shelf.keep(key, found, maps.nbytes)
        return found

    @torch.no_grad()
    def _base(self, expert: Expert, fold: int, episodes: Sequence[EpisodeKey], layer: str, own: Tensor) -> Tensor:
        if not expert.use_base:
            return torch.zeros(len(episodes), 1, *self.bank.grid, device=self.bank.device)
        keys = [(e.query, layer) for e in episodes]
        return base_map(self.memory.logits(expert, fold, keys, self.bank.get(keys)), own)

    def _mask(self, id: str, label: int, layer: str, novel: Sequence[int], policy: str) -> Tensor:
        key = (id, label, layer, tuple(novel), policy)
        if key in self.shelf.held:
            return self.shelf.held[key]
        mask = self.bank.canvas.label(episode_mask(self.bank.views.label(id, layer, novel, policy), label))
        self.shelf.keep(key, mask, mask.nbytes)
        return mask


def answer(expert: Expert, laid: Evidence | Question) -> EnsembleOut:
    if isinstance(laid, Evidence):
        return expert.decide(laid.maps, laid.psi, laid.base, laid.shown)
    return expert(laid.batch.query, laid.batch.support, laid.batch.masks, laid.own, laid.base)
