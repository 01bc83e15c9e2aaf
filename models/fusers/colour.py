"""Colour as luminance and chroma, so that a fused luminance can take the visible picture's colours.

Y, Cr and Cb with the weights of ITU-R BT.601, at full range and with chroma centred at 0.5. The inverse is the exact
one; the three-digit constants that are often written down lose up to 1e-3.

Legend: B batch, H W height and width; all values are 0..1.
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue
CR_SPAN, CB_SPAN = 2 * (1 - LUMA[0]), 2 * (1 - LUMA[2])


def luminance(rgb: Tensor) -> Tensor:
    """[B,3,H,W] -> Y [B,1,H,W]."""
    return (rgb * rgb.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def to_ycrcb(rgb: Tensor) -> Tensor:
    """[B,3,H,W] red, green, blue -> [B,3,H,W] Y, Cr, Cb."""
    y = luminance(rgb)
    return torch.cat([y, (rgb[:, :1] - y) / CR_SPAN + 0.5, (rgb[:, 2:] - y) / CB_SPAN + 0.5], 1)


def to_rgb(ycrcb: Tensor) -> Tensor:
    """[B,3,H,W] Y, Cr, Cb -> [B,3,H,W] red, green, blue; beyond 0..1 where the colour does not exist."""
    y, cr, cb = ycrcb.split(1, 1)
    red, blue = y + CR_SPAN * (cr - 0.5), y + CB_SPAN * (cb - 0.5)
    green = (y - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
    return torch.cat([red, green, blue], 1)


def recolour(fused: Tensor, visible: Tensor) -> Tensor:
    """Fused luminance [B,1,H,W] in the colours of visible [B,3,H,W] -> [B,3,H,W], cut to 0..1 once."""
    return to_rgb(torch.cat([fused, to_ycrcb(visible)[:, 1:]], 1)).clamp(0, 1)
