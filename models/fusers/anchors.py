"""What a fusion network may start from: it then learns what to add. None of it is in the papers; nothing is learnt.

"two_scale" takes a picture for its Gaussian blur and the detail that the blur leaves, and fuses each for itself, as was
done before there were networks (a known form: Li, Kang, Hu, "Image Fusion With Guided Filtering", IEEE TIP 2013).

Legend: B batch, c channels, H W height and width; pictures are float in 0..1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fusers.filters import edges, filter_valid, gaussian_taps

GLOW, ACTIVITY = 8.0, 4.0
"""σ in pixels: of the blur that parts the scales, and of the neighbourhood in which edges are counted."""


def two_scale(infrared: Tensor, visible: Tensor) -> Tensor:
    """blur(max(a, b)) + the detail of a where a has the stronger edges around, else of b. [B,c,H,W], float32.

    infrared may have one channel where visible has three; 5 pixels a side or more. Values may leave 0..1 a little.
    """
    pair = torch.stack([infrared.expand_as(visible), visible]).float()
    livelier = blur(edges(pair), ACTIVITY)
    detail = pair - blur(pair, GLOW)
    return blur(pair.amax(0), GLOW) + torch.where(livelier[0] > livelier[1], detail[0], detail[1])


ANCHORS = {"mean": lambda a, b: (a + b) / 2, "brightest": torch.maximum, "two_scale": two_scale}


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian of [..., H, W], cut at 3 σ, with the border repeated."""
    reach = math.ceil(3 * sigma)
    padded = F.pad(x.reshape(-1, 1, *x.shape[-2:]), [reach] * 4, mode="replicate")
    return filter_valid(padded, gaussian_taps(2 * reach + 1, sigma)).view_as(x)
