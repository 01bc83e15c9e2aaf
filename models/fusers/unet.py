"""The denoising network of SGDFuse (arXiv 2508.05264): a U-Net in the manner of SR3 (Saharia et al. 2021), and HFAH.

The U-Net returns what its decoder has at each level; HFAH, the hierarchical feature aggregation head, weighs those
maps by attention and joins them. The noise level of each image, √ᾱ, enters every residual block.
Attention within the picture is at the coarsest level only; with the released settings it acts nowhere else.

Legend: B batch, h w the U-Net's own grid (multiples of 2 ^ (levels - 1)), c_i channels of level i, finest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NoiseLevel(nn.Module):
    """Levels [B] in 0..1 -> [B,width]: sinusoids and a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, level: Tensor) -> Tensor:
        half = self.width // 2
        speeds = torch.exp(-math.log(1e4) * torch.arange(half, device=level.device) / half)
        angles = 1000 * level.float()[:, None] * speeds
        return self.body(torch.cat([angles.sin(), angles.cos()], 1).to(self.body[0].weight.dtype))


class Residual(nn.Module):
    """Norm, swish and convolution, twice; the noise level is added in between."""

    def __init__(self, source: int, target: int, level: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(groups, source), nn.SiLU(), nn.Conv2d(source, target, 3, padding=1))
        self.level = nn.Linear(level, target)
        self.second = nn.Sequential(
            nn.GroupNorm(groups, target), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(target, target, 3, padding=1)
        )
        self.skip = nn.Identity() if source == target else nn.Conv2d(source, target, 1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        hidden = self.first(x) + self.level(level)[:, :, None, None]
        return self.skip(x) + self.second(hidden)


class PixelAttention(nn.Module):
    """Self-attention over all pixels, one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.enter, self.leave = nn.Conv2d(width, 3 * width, 1, bias=False), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.flatten(2).transpose(1, 2)[:, None] for part in self.enter(self.norm(x)).chunk(3, 1))
        out = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.leave(out.transpose(1, 2).unflatten(2, x.shape[2:]))


class UNet(nn.Module):
    """base and mults: c_i = base * mult; blocks: residual blocks per level on the way down, one more on the way up."""

    def __init__(
        self,
        source: int,
        base: int = 64,
        mults: Sequence[int] = (1, 2, 4, 8),
        blocks: int = 2,
        dropout: float = 0.2,
        attention: bool = True,
    ) -> None:
        super().__init__()
        groups = math.gcd(32, base)
        self.channels = tuple(base * mult for mult in mults)
        self.level, self.stem = NoiseLevel(base), nn.Conv2d(source, base, 3, padding=1)
        kept, width = [base], base
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, channels in enumerate(self.channels):
            sources = [kept[-1], *[channels] * (blocks - 1)]
            layers = [Residual(c, channels, base, groups, dropout) for c in sources]
            shrink = nn.Conv2d(channels, channels, 3, 2, 1) if i + 1 < len(mults) else None
            self.down.append(_level(layers, shrink))
            kept += [channels] * (blocks + (shrink is not None))
        width = self.channels[-1]
        self.middle = nn.ModuleList(Residual(width, width, base, groups, dropout) for _ in range(2))
        self.attention = PixelAttention(width, groups) if attention else nn.Identity()
        for i, channels in reversed(list(enumerate(self.channels))):
            layers = []
            for _ in range(blocks + 1):
                layers.append(Residual(width + kept.pop(), channels, base, groups, dropout))
                width = channels
            self.up.append(_level(layers, nn.Conv2d(width, width, 3, padding=1) if i else None))

    def forward(self, x: Tensor, level: Tensor) -> list[Tensor]:
        """[B,source,h,w] and noise levels [B] -> the decoder's maps [B,c_i,h/2^i,w/2^i], finest first."""
        level = self.level(level)
        x = self.stem(x)
        kept = [x]
        for stage in self.down:
            for layer in stage["layers"]:
                x = layer(x, level)
                kept.append(x)
            if "resample" in stage:
                x = stage["resample"](x)
                kept.append(x)
        x = self.middle[1](self.attention(self.middle[0](x, level)), level)
        found = []
        for stage in self.up:
            for layer in stage["layers"]:
                x = layer(torch.cat([x, kept.pop()], 1), level)
            found.insert(0, x)
            if "resample" in stage:
                x = stage["resample"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return found


def _level(layers: list[nn.Module], resample: nn.Module | None) -> nn.ModuleDict:
    parts = {"layers": nn.ModuleList(layers)} | ({} if resample is None else {"resample": resample})
    return nn.ModuleDict(parts)


class Gate(nn.Module):
    """CBAM (Woo et al. 2018): channels weighed by their mean and maximum, pixels by theirs; kind says which of both."""

    def __init__(self, width: int, kind: str, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(1, width // ratio)
        self.channel = self.spatial = None
        if kind in ("channel", "cbam"):
            squeeze, widen = nn.Conv2d(width, hidden, 1, bias=False), nn.Conv2d(hidden, width, 1, bias=False)
            self.channel = nn.Sequential(squeeze, nn.ReLU(), widen)
        if kind in ("spatial", "cbam"):
            self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.channel is not None:
            pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
            x = x * sum(self.channel(p) for p in pooled).sigmoid()
        if self.spatial is not None:
            x = x * self.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        return x


class AggregationHead(nn.Module):
    """HFAH: decoder maps of all levels, gated, brought to 64 channels and the finest grid, joined -> a picture.

    attention: "channel" (the released one), "spatial" (the paper's word) or "cbam", both.
    """

    def __init__(self, channels: Sequence[int], target: int, attention: str = "cbam", width: int = 64) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate(c, attention) for c in channels)
        self.enter = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.body = nn.Sequential(
            nn.Conv2d(width * len(channels), width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.leave = nn.Conv2d(width // 2, target, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B,c_i,h_i,w_i] each, finest first -> [B,target,h,w], before its tanh."""
        entered = [enter(gate(x)) for gate, enter, x in zip(self.gates, self.enter, maps, strict=True)]
        size = maps[0].shape[2:]
        wide = [entered[0]]
        wide += [F.interpolate(x, size, mode="bilinear", align_corners=True) for x in entered[1:]]
        return self.leave(self.body(torch.cat(wide, 1)))


class PlainHead(nn.Module):
    """The end of a U-Net without HFAH: norm, swish, convolution on the finest map."""

    def __init__(self, channels: Sequence[int], target: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(math.gcd(32, channels[0]), channels[0]), nn.SiLU(), nn.Dropout(dropout))
        self.leave = nn.Conv2d(channels[0], target, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B,c_i,h_i,w_i] each, finest first -> [B,target,h,w]."""
        return self.leave(self.body(maps[0]))
