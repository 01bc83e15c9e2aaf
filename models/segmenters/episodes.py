"""From an episode's name to what the experts read: features of all streams, masks, targets.

Legend: B episodes, K supports, V streams, H x W canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.backbone import Encoder, Features
from models.episode import EpisodeKey
from models.segmenters.expert import Expert
from models.segmenters.similarity import soft_mask
from models.views import FeatureBank, episode_mask


class Batch(NamedTuple):
    """query: V of levels [B, c, h', w']; support: V of [B, K, c, h', w']; masks uint8 [B, K, H, W];
    targets uint8 [V, B, H, W] of {0, 1, 255}, one for each stream's own layer."""

    query: list[Features]
    support: list[Features]
    masks: Tensor
    targets: Tensor


def gather(
    bank: FeatureBank, episodes: Sequence[EpisodeKey], layers: Sequence[str], novel: Sequence[int] = (),
    policy: str = "ignore",
) -> Batch:
    """Features and masks of `episodes`; stream v reads layers[v].

    novel, policy: what training must not see (`models.episode.train_label`); none in testing.
    """
    query, support = levels_of(bank, episodes, layers)

    def mask(id: str, label: int, layer: str) -> Tensor:
        return bank.canvas.label(episode_mask(bank.views.label(id, layer, novel, policy), label))

    shown = torch.stack([mask(id, e.label, layers[0]) for e in episodes for id in e.supports])
    targets = torch.stack([torch.stack([mask(e.query, e.label, layer) for e in episodes]) for layer in layers])
    masks = shown.unflatten(0, (len(episodes), -1)).to(bank.device)
    support = [shown_features(bank.encoder, levels, masks) for levels in support]
    return Batch(query, support, masks, targets.to(bank.device))


def levels_of(
    bank: FeatureBank, episodes: Sequence[EpisodeKey], layers: Sequence[str]
) -> tuple[list[Features], list[Features]]:
    """V entries of the queries' levels [B, c, h', w'] and V of the supports' [B, K, c, h', w'], stream v on layers[v].

    Every picture is encoded at most once, together.
    """
    queries = [episode.query for episode in episodes]
    supports = [id for episode in episodes for id in episode.supports]
    names = (*queries, *supports)
    everything = bank.get([(id, layer) for layer in layers for id in names])
    query, support = [], []
    for start in range(0, len(layers) * len(names), len(names)):
        middle = start + len(queries)
        query.append(everything.part(start, middle))
        support.append(everything.part(middle, start + len(names)).shots(len(supports) // len(queries)))
    return query, support


@torch.no_grad()
def shown_features(encoder: Encoder, support: Features, masks: Tensor) -> Features:
    """The levels [B, K, c, h', w'] of supports and, where the learner wants it, the high one of the masked mid one."""
    if not encoder.wants.masked:
        return support
    grid = tuple(support.mid.shape[-2:])
    marked = soft_mask(masks, grid).foreground.flatten(0, 1)[:, None]
    high = encoder.masked(support.mid.flatten(0, 1), marked).float()
    return Features(*support, high.unflatten(0, masks.shape[:2]))


class BaseMemory:
    """The frozen base learners' logits of query pictures: each computed once, shared by seeds, classes and streams.

    budget: bytes. Logits rest on the encoder's device as float32 [C, h, w].
    """

    def __init__(self, budget: int = 1 << 30) -> None:
        self.budget, self.bytes = budget, 0
        self.held: dict[tuple[int, str, str], Tensor] = {}

    def logits(self, expert: Expert, fold: int, keys: Sequence[tuple[str, str]], query: Features) -> Tensor | None:
        """[B, C, h, w] of the (id, layer) keys whose features are `query`; None when the expert takes no base map."""
        if not expert.use_base:
            return None
        return torch.stack([self._one(expert, (fold, *key), query, place) for place, key in enumerate(keys)])

    def _one(self, expert: Expert, key: tuple[int, str, str], query: Features, place: int) -> Tensor:
        """One picture at a time, so that no bit depends on what is held already."""
        if key in self.held:
            return self.held[key]
        levels = Features(*query[:3]).part(place, place + 1)
        found = expert.base_logits(levels, tuple(levels.low.shape[-2:]))[0]
        if self.bytes + found.nbytes <= self.budget:
            self.held[key], self.bytes = found, self.bytes + found.nbytes
        return found
