"""What SegMiF and SGDFuse are trained by: intensity, gradients, structure, inside masks and outside.

|∇x| is |Sobel x| + |Sobel y| with a reflected border. All losses are float32 scalars.

Legend: B batch, c channels, H W height and width; pictures are float in 0..1, masks in 0..1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from models.fusers.colour import luminance
from models.fusers.filters import edges, filter_valid, gaussian_taps, sobel
from models.fusers.metrics import edge_quality, information
from models.fusers.settings import FuserSettings


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean structural similarity of [B,c,H,W] each, 11 x 11 Gaussian (σ 1.5) where it fits; sides of 11 or more."""
    taps = gaussian_taps(11, 1.5)
    mean_x, mean_y, xx, yy, xy = filter_valid(torch.stack([x, y, x * x, y * y, x * y]).float(), taps)
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    scale = (mean_x.square() + mean_y.square() + c1) * (xx - mean_x.square() + yy - mean_y.square() + c2)
    return (likeness / scale).mean()


def warm_up_loss(fused: Tensor, target: Tensor) -> Tensor:
    """SegMiF's first round: |u - t| + ||∇u| - |∇t||, means. [B,1,H,W] each."""
    return l1_loss(fused, target) + l1_loss(edges(fused), edges(target))


def target_loss(fused: Tensor, target: Tensor) -> Tensor:
    """SegMiF's later rounds: MSE(u, t) + 1.1 (1 - SSIM(u, t)). [B,1,H,W] each."""
    return mse_loss(fused, target) + 1.1 * (1 - ssim(fused, target))


def maximum_loss(fused: Tensor, infrared: Tensor, visible: Tensor, gradient_weight: float = 10.0) -> Tensor:
    """|u - max(a, b)| + α ||∇u| - max(|∇a|, |∇b|)|, means: SGDFuse's Stage I. [B,c,H,W]; infrared may have c = 1."""
    brightest = torch.maximum(infrared.expand_as(visible), visible)
    sharpest = torch.maximum(edges(infrared).expand_as(visible), edges(visible))
    return l1_loss(fused, brightest) + gradient_weight * l1_loss(edges(fused), sharpest)


def own_losses(fused: Tensor, infrared: Tensor, visible: Tensor, settings: FuserSettings) -> Tensor:
    """What the settings add to the papers' losses; colour pictures are judged by their luminance."""
    total = fused.new_zeros(())
    if settings.complement_weight:
        total = total + settings.complement_weight * complement_loss(fused, infrared, visible)
    if settings.metric_weight:
        grey = (x if x.shape[1] == 1 else luminance(x) for x in (fused, infrared, visible))
        total = total + settings.metric_weight * metric_loss(*grey)
    return total


def metric_loss(fused: Tensor, infrared: Tensor, visible: Tensor) -> Tensor:
    """What Qabf, VIF and SCD miss, as a loss: 6 (1 - Qabf) + ½ (1 - VIF / 2) + 0.1 (1 - SCD / 2). [B,1,H,W] each.

    Not one of the papers' losses: a fuser that was trained by it has been told what it will be measured by. Qabf and
    VIF are ratios of sums; their sums are taken over the batch, so that a dark crop weighs what it weighs in a frame.
    Qabf is smoothed where gradients vanish, and leaves the border out.
    """
    trio = 255 * torch.stack([x[:, 0].double() for x in (infrared, visible, fused)])
    told, present = (part.sum(1) + 1e-10 for part in information(trio))
    missed = 6 * (1 - smooth_edge_transfer(trio)) + 0.5 * (1 - (told / present).sum() / 2)
    return missed.float() + 0.1 * complement_loss(fused, infrared, visible)


def smooth_edge_transfer(trio: Tensor) -> Tensor:
    """Qabf of a, b, f, float64 [3,B,H,W] in 0..255, taken as one picture; with a gradient everywhere."""
    across, down = sobel(trio, "valid")
    strength = (across.square() + down.square() + 1).sqrt()
    kept = 0.0
    for i in (0, 1):
        ratio = torch.minimum(strength[i], strength[2]) / torch.maximum(strength[i], strength[2])
        along = (across[i] * across[2] + down[i] * down[2]).abs() / (strength[i] * strength[2])
        kept = kept + (edge_quality(ratio, 1 - along.clamp_max(0.999).acos() / (math.pi / 2)) * strength[i]).sum()
    return kept / strength[:2].sum()


def complement_loss(fused: Tensor, infrared: Tensor, visible: Tensor) -> Tensor:
    """1 - SCD / 2 (Aslantas and Bendes 2015): what was added to either source should look like the other. [B,c,H,W].

    Not one of the papers' losses.
    """
    infrared = infrared.expand_as(visible)
    alike = _correlation(fused - visible, infrared) + _correlation(fused - infrared, visible)
    return (1 - alike / 2).mean()


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, per image [B]; 0 where either is constant."""
    x, y = (z.float().flatten(1) - z.float().flatten(1).mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1) + 1e-6).sqrt()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Σ (mask ⊙ values) / Σ mask per image, [B]; 0 where the mask is empty."""
    mask = mask.expand_as(values).float()
    return (mask * values).flatten(1).sum(1) / (mask.flatten(1).sum(1) + 1e-6)


def masked_losses(
    estimate: Tensor, first: Tensor, infrared: Tensor, visible: Tensor, mask_infrared: Tensor, mask_visible: Tensor
) -> dict[str, Tensor]:
    """SGDFuse's Stage II on its estimate of x_0, per image [B]: intensity and gradient inside masks, F1 outside.

    estimate, first (F1) and visible [B,c,H,W], infrared and masks [B,1,H,W]. Empty masks leave `background` alone.
    """
    salient = (mask_infrared + mask_visible).clamp(0, 1)
    sharpest = torch.maximum(edges(infrared).expand_as(visible), edges(visible))
    hot = masked_mean((estimate - infrared).abs(), mask_infrared)
    return {
        "intensity": hot + masked_mean((estimate - visible).abs(), mask_visible * (1 - mask_infrared)),
        "gradient": masked_mean((edges(estimate) - sharpest).abs(), salient),
        "background": ((1 - salient) * (estimate - first).abs()).flatten(1).mean(1),
    }
