"""Visual saliency maps, and the blend of a pair that they weigh.

VSM: a pixel is salient by its summed distance to the grey levels of all pixels (Zhai and Shah 2006), as Ma, Zhou,
Wang and Zong, "Infrared and visible image fusion based on visual saliency map and weighted least square optimization",
Infrared Physics & Technology 2017, use it to weigh a pair. With 256 levels it is a table that is looked up.

Legend: B batch, H W height and width; pictures are float in 0..1.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 256


def saliency(grey: Tensor) -> Tensor:
    """[B,1,H,W] -> [B,1,H,W]: V(p) = Σ_i n_i |I_p - i| over the 8-bit histogram n, scaled to 0..1 per image.

    A constant picture has saliency 0.
    """
    level = (grey * (LEVELS - 1)).round().clamp(0, LEVELS - 1).long().flatten(1)
    counts = torch.zeros(len(grey), LEVELS, device=grey.device).scatter_add_(1, level, torch.ones_like(level).float())
    steps = torch.arange(LEVELS, device=grey.device, dtype=torch.float32)
    table = (counts / level.shape[1]) @ (steps[:, None] - steps).abs()
    value = table.gather(1, level)
    low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
    return ((value - low) / (high - low).clamp_min(1e-6)).view_as(grey).to(grey.dtype)


def saliency_blend(infrared: Tensor, luminance: Tensor) -> Tensor:
    """W ⊙ infrared + (1 - W) ⊙ luminance with W = ½ + ½ (V_infrared - V_visible); all [B,1,H,W]."""
    weight = 0.5 + 0.5 * (saliency(infrared) - saliency(luminance))
    return weight * infrared + (1 - weight) * luminance
