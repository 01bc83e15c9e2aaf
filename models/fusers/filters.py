"""Separable Gaussians and Sobel derivatives, for metrics (float64) and for losses (float32, with gradients).

A filter is a sum of shifted pictures: in float64, for which PyTorch has no fast convolution on a CPU, that is the
quickest way, and it is as good on a GPU.

Legend: ... any leading dimensions, H W height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian_taps(size: int, sigma: float) -> list[float]:
    """The taps of a normalised Gaussian window of odd `size`."""
    half = size // 2
    taps = [math.exp(-((i - half) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [tap / sum(taps) for tap in taps]


def filter_valid(x: Tensor, taps: list[float]) -> Tensor:
    """[..., H, W] -> [..., H-n+1, W-n+1] for n taps along both sides, where the window fits.

    On a CPU without gradients picture by picture, so that what is added up stays in the processor's cache.
    """
    if x.is_cuda or x.requires_grad:
        return _along(_along(x, taps, -1), taps, -2)
    pictures = [_along(_along(picture, taps, -1), taps, -2) for picture in x.reshape(-1, *x.shape[-2:])]
    return torch.stack(pictures).view(*x.shape[:-2], *pictures[0].shape)


def _along(x: Tensor, taps: list[float], dim: int) -> Tensor:
    length = x.shape[dim] - len(taps) + 1
    out = x.narrow(dim, 0, length) * taps[0]
    for i, tap in enumerate(taps[1:], start=1):
        out.add_(x.narrow(dim, i, length), alpha=tap)
    return out


def sobel(x: Tensor, border: str = "reflect") -> tuple[Tensor, Tensor]:
    """Horizontal and vertical derivatives of [..., H, W], with the weights 1, 2, 1 across.

    border: "reflect" or "zero" padding gives [..., H, W]; "valid" gives [..., H-2, W-2].
    """
    if border != "valid":
        flat = x.reshape(-1, 1, *x.shape[-2:])
        padded = F.pad(flat, (1, 1, 1, 1), mode="reflect" if border == "reflect" else "constant")
        x = padded.reshape(*x.shape[:-2], *padded.shape[-2:])
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    return _smooth(across, -2), _smooth(down, -1)


def _smooth(x: Tensor, dim: int) -> Tensor:
    length = x.shape[dim] - 2
    return x.narrow(dim, 0, length) + 2 * x.narrow(dim, 1, length) + x.narrow(dim, 2, length)


def edges(x: Tensor) -> Tensor:
    """|Sobel x| + |Sobel y| of [..., H, W], same size; the border is reflected, since zeros would draw a frame."""
    across, down = sobel(x)
    return across.abs() + down.abs()
