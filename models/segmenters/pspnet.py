"""The base learner: PSPNet's pyramid pooling over frozen features (arXiv 1612.01105; BAM §3.1).

Legend: B images, C = 1 + base classes, h x w cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.backbone import Features


class PSPNet(nn.Module):
    """Pyramid pooling head over the mid and high levels.

    channels: widths of the encoder's (low, mid, high); classes: base classes without background.
    width: hidden channels (512 in the paper). bins: cells per side of each pooled map.
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
        pyramid = [_stretch(reduce(_pool(x, bins)), own) for bins, reduce in zip(self.bins, self.reduce, strict=True)]
        return self.merge(torch.cat([x, *pyramid], 1))


def base_map(logits: Tensor, leave_out: Tensor | None = None) -> Tensor:
    """P_b [B, 1, h, w]: how likely a cell is some base class (BAM eq. 10; GenFusion spec §3.4).

    logits [B, C, h, w]; leave_out [B] long: the index of the episode's own class among the base classes (from 1), left
    out of the sum in training; 0 leaves none out. The background's share is never part of the sum.
    """
    shares = logits.softmax(1)
    total = shares[:, 1:].sum(1, keepdim=True)
    if leave_out is None:
        return total
    own = shares.gather(1, leave_out.view(-1, 1, 1, 1).expand(-1, 1, *shares.shape[-2:]))
    return total - own * (leave_out > 0).view(-1, 1, 1, 1)


def _convolution(inside: int, outside: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, size, padding=size // 2, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


def _pool(x: Tensor, bins: int) -> Tensor:
    """Mean over bins x bins regions; a 1x1 map per image makes batch statistics of single images meaningless, so the
    pooled map is normalised over the batch as PSPNet does and needs batches of two or more in training."""
    return nn.functional.adaptive_avg_pool2d(x, bins)


def _stretch(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == grid else interpolate(x, grid, mode="bilinear", align_corners=False)
