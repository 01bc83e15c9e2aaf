"""The base learner: PSPNet's pyramid pooling over frozen features (arXiv 1612.01105; BAM §3.1).

Legend: B images, C = 1 + base classes, h x w cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from models.backbone import Features


class PSPNet(nn.Module):
    """Pyramid pooling head over the mid and high levels.

    channels: widths of the encoder's (low, mid, high); classes: base classes without background.
    width: hidden channels (512 in the paper). bins: cells per side of each pooled map. A map of one cell is normalised
    over the batch, as in the paper, so training needs batches of two or more.
    """

    def __init__(self, channels: tuple[int, int, int], classes: int, width: int = 512, bins=(1, 2, 3, 6)) -> None:
        super().__init__()
        inside = channels[1] + channels[2]
        branch = width // len(bins)
        self.bins, self.width = tuple(bins), width
        self.reduce = nn.ModuleList(_convolution(inside, branch, 1) for _ in bins)
        self.merge = nn.Sequential(_convolution(inside + branch * len(bins), width, 3), nn.Dropout2d(0.1))
        self.classify = nn.Conv2d(width, 1 + classes, 1)

    def forward(self, features: Features, grid: tuple[int, int]) -> Tensor:
        """Logits [B, C, h, w] on `grid`, background first; the work is done on the mid level's own, coarser grid."""
        return _stretch(self.classify(self.embed(features)), grid)

    def embed(self, features: Features) -> Tensor:
        """What is classified: [B, width, h', w'] on the mid level's grid."""
        own = tuple(features.mid.shape[-2:])
        x = torch.cat([features.mid.float(), _stretch(features.high.float(), own)], 1)
        pooled = [reduce(adaptive_avg_pool2d(x, bins)) for bins, reduce in zip(self.bins, self.reduce, strict=True)]
        return self.merge(torch.cat([x, *(_stretch(region, own) for region in pooled)], 1))


def base_map(logits: Tensor, leave_out: Tensor | None = None) -> Tensor:
    """P_b [B, 1, h, w]: how likely a cell is some base class (BAM eq. 10; GenFusion spec §3.4).

    logits [B, C, h, w]; leave_out [B] long: the index of the episode's own class among the base classes (from 1), left
    out of the sum in training; 0 leaves none out, -1 all of them (what is asked for has no name, so a base object may
    be it). The background's share is never part of the sum.
    """
    shares = logits.softmax(1)
    total = shares[:, 1:].sum(1, keepdim=True)
    if leave_out is None:
        return total
    index = leave_out.view(-1, 1, 1, 1)
    own = shares.gather(1, index.clamp(min=0).expand(-1, 1, *shares.shape[-2:]))
    return (total - own * (index > 0)) * (index >= 0)


def _convolution(inside: int, outside: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, size, padding=size // 2, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


def _stretch(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == grid else interpolate(x, grid, mode="bilinear", align_corners=False)
