"""Features of a denoiser in training, pulled to those of a recogniser that sees the clean picture.

Representation alignment (Yu et al., "Representation Alignment for Generation", arXiv 2410.06940, eq. 8): a denoiser
spends most of a short training on finding out what shapes there are; a network that tells them apart knows. Published
pipelines are trained already; this is for those that are fitted here (`models.generators.toy_pipeline`).

Legend: B pictures of H x W pixels, c channels of a level of the denoiser, d of the recogniser's features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity


class Aligner(nn.Module):
    """Projections of what a denoiser (UNet2DConditionModel of two levels or more) says in its middle and one level
    above, on the way down, and how far they are from the targets.

    width: d. seed: of the projections' weights. It hears the denoiser within `listening` alone, and nothing of it stays
    in the denoiser.
    """

    def __init__(self, denoiser: Any, width: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            levels = denoiser.config.block_out_channels[:-3:-1]
            self.project = nn.ModuleList(nn.Conv2d(level, width, 1) for level in levels)
        self._heard: dict[int, Tensor] = {}

    @contextmanager
    def listening(self, denoiser: Any) -> Iterator[Aligner]:
        """Keeps the features [B, c, h, w] of each forward, with their gradient."""
        above = denoiser.down_blocks[-2]
        places = (denoiser.mid_block, (getattr(above, "attentions", None) or above.resnets)[-1])

        def keep(place: int):
            def hook(module: nn.Module, shown: Any, said: Any) -> None:
                self._heard[place] = said if torch.is_tensor(said) else said[0]

            return hook

        with ExitStack() as hooks:
            for n, place in enumerate(places):
                hooks.callback(place.register_forward_hook(keep(n)).remove)
            yield self
        self._heard.clear()

    def loss(self, targets: Tensor) -> Tensor:
        """Sum over the places of 1 - the mean cosine, cell by cell, of the last forward's features with targets
        [B, d, h', w'], which are brought to h x w by means over areas: 0..4."""
        apart = []
        for n, project in enumerate(self.project):
            said = project(self._heard[n])
            aim = adaptive_avg_pool2d(targets, said.shape[-2:])
            apart.append(1 - cosine_similarity(said, aim, dim=1).mean())
        return sum(apart)


@torch.no_grad()
def targets_of(recogniser: Any, pictures: Tensor, batch: int = 64) -> Tensor:
    """What a recogniser sees in clean pictures [N, 3, H, W] in -1..1, less the mean of all: [N, d, H/8, W/8]. Features
    that are never negative all point the same way, and to agree with them would be no feat."""
    seen = torch.cat([recogniser.describe(part) for part in pictures.split(batch)])
    return seen - seen.mean((0, 2, 3), keepdim=True)
