"""Fusers that are small enough to wait for, and pairs to fuse."""

from __future__ import annotations

import torch
from torch import Tensor

from models import FUSERS, find
from models.fusers.base import Fuser

SMALL: dict[str, dict] = {
    "segmif": {
        "classes": 3, "width": 16, "growth": 8, "heads": 4, "widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1),
        "head_width": 16,
    },
    "sgdfuse": {
        "configuration": "fast", "width": 8, "heads": 2, "blocks": (1, 1), "base": 8, "mults": (1, 2), "res_blocks": 1,
        "steps": 2,
    },
}  # fmt: skip


def small(name: str, seed: int = 0, **changes) -> Fuser:
    """The fuser `name` of the table with few weights, drawn from `seed`; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return find(FUSERS, name)(**{**SMALL.get(name, {}), **changes}).eval()


def pair(batch: int = 2, height: int = 32, width: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise over a ramp: infrared [B,1,H,W] and visible [B,3,H,W] in 0..1."""
    draw = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 0.6, width).expand(batch, 1, height, width)
    infrared = ramp + 0.4 * torch.rand(batch, 1, height, width, generator=draw)
    return infrared, ramp.flip(3) + 0.4 * torch.rand(batch, 3, height, width, generator=draw)


def drawn_pairs(batch: int = 4, side: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes: infrared with a hot square, visible with a coloured bar, label [B,H,W] of {0, 1, 2}."""
    draw = torch.Generator().manual_seed(seed)
    infrared = 0.2 + 0.02 * torch.rand(batch, 1, side, side, generator=draw)
    visible = 0.4 + 0.02 * torch.rand(batch, 3, side, side, generator=draw)
    label = torch.zeros(batch, side, side, dtype=torch.long)
    for i, (x, y) in enumerate(torch.randint(0, side // 2, (batch, 2), generator=draw).tolist()):
        square, bar = slice(y, y + side // 4), slice(x + side // 4, x + side // 4 + side // 8)
        infrared[i, :, square, x : x + side // 4], label[i, square, x : x + side // 4] = 0.9, 1
        visible[i, :, :, bar], label[i, :, bar] = torch.tensor([0.8, 0.7, 0.1])[:, None, None], 2
    return infrared, visible, label
