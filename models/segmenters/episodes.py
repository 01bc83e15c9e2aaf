"""From an episode's name to what the experts read: features of all streams, masks, targets.

Legend: B episodes, K supports, V streams, H x W canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.backbone import Features
from models.episode import EpisodeKey
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
    """Features and masks of `episodes`; stream v reads layers[v]. Every picture is encoded at most once, together.

    novel, policy: what training must not see (`models.episode.train_label`); none in testing.
    """
    queries = [episode.query for episode in episodes]
    supports = [id for episode in episodes for id in episode.supports]
    keys = [(id, layer) for layer in layers for id in (*queries, *supports)]
    everything = bank.get(keys)
    query, support = [], []
    for block in zip(*(level.chunk(len(layers)) for level in everything), strict=True):
        query.append(Features(*(level[: len(queries)] for level in block)))
        rest = (level[len(queries) :] for level in block)
        support.append(Features(*(level.unflatten(0, (len(queries), -1)) for level in rest)))

    def mask(id: str, label: int, layer: str) -> Tensor:
        return bank.canvas.label(episode_mask(bank.views.label(id, layer, novel, policy), label))

    masks = torch.stack([mask(id, e.label, layers[0]) for e in episodes for id in e.supports])
    targets = torch.stack([torch.stack([mask(e.query, e.label, layer) for e in episodes]) for layer in layers])
    return Batch(query, support, masks.unflatten(0, (len(queries), -1)).to(bank.device), targets.to(bank.device))
