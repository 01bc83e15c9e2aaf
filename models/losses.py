"""Losses that know ignored pixels. Each is a float32 scalar, and 0 with a gradient when nothing is left to learn from.

Legend: B images, C classes, H x W pixels. Logits are raw scores; targets hold class ids, and 255 where unknown.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = 255


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the pixels whose target is known.

    logits [B, C, H, W], target [B, H, W] integer, `weight` [C] per class (then the mean is weighted, as torch does it).
    PyTorch's own mean is 0 / 0 = NaN when all pixels are ignored; here that is 0.
    """
    target = target.long()
    logits = logits.float()
    summed = functional.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum")
    valid = target != IGNORE
    if weight is None:
        mass = valid.sum().to(summed.dtype)
    else:
        mass = (weight.to(summed.dtype)[target.masked_fill(~valid, 0)] * valid).sum()
    return summed / torch.where(mass > 0, mass, torch.ones_like(mass))


def dice(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Mean over samples of 1 - soft Dice of the foreground (V-Net, arXiv 1606.04797, without its squares).

    logits [B, 2, H, W], target [B, H, W] of {0, 1, 255}. With p the foreground's probability and t the mask, each over
    the known pixels of one sample: Dice = (2 Σ p t + smooth) / (Σ p + Σ t + smooth). Per sample, because over a batch
    a large object would drown a small one. Samples without a known pixel are left out. In [0, 1].
    """
    valid = (target != IGNORE).float()
    mask = (target == 1).float()
    probability = logits.float().softmax(1)[:, 1] * valid
    overlap, total = (x.flatten(1).sum(1) for x in (probability * mask, probability + mask))
    loss = 1 - (2 * overlap + smooth) / (total + smooth)
    known = (valid.flatten(1).sum(1) > 0).float()
    return loss.sum() / known.sum().clamp(min=1)  # without a known pixel the loss is 0 already


def jaccard(logits: Tensor, target: Tensor, group: Tensor, smooth: float = 1.0) -> Tensor:
    """Mean over groups of -log soft IoU of the foreground, summed over a group's samples before the division.

    logits [B, 2, H, W], target [B, H, W] of {0, 1, 255}, group [B] (the class of each episode): the training twin of
    the field's mIoU, which also sums intersections and unions of a class before it divides. At least 0.
    """
    valid = (target != IGNORE).float()
    mask = (target == 1).float()
    probability = logits.float().softmax(1)[:, 1] * valid
    both, either = ((x).flatten(1).sum(1) for x in (probability * mask, probability + mask - probability * mask))
    same = (group[:, None] == group[None]).float()
    ratio = (same @ both + smooth) / (same @ either + smooth)
    return -(ratio.log() / same.sum(1)).sum() / (1 / same.sum(1)).sum()
