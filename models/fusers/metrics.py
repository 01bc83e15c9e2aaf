"""How good a fused picture is: eleven measures without a ground truth, for whole batches.

Pictures are grey and 8 bit (`grey8`), computed in float64 on 0..255, one value per image. Definitions, with the
traps of the toolkits in use: MI is in bits; PSNR has one peak of 255; SSIM, VIF and MI are sums over both sources;
SSIM has an 11 x 11 Gaussian window (σ 1.5) where it fits; VIF is the pixel-domain one, with the source as reference.
Qabf (Xydeas and Petrović 2000) has two borders: "reference" pads with zeros as the literature does, which draws the
same strong frame in all three pictures; "interior" leaves the outermost pixels out.

torchmetrics has SSIM (with another border), VIF and PSNR of single pairs; sharing the filtered maps of the three
pictures between the measures is what makes this file quick, and the tests hold it to torchmetrics.

Legend: B images, H W height and width; a infrared, b visible, f fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.errors import UsageError
from models.fusers.colour import luminance
from models.fusers.filters import filter_valid, gaussian_taps, sobel
from models.fusers.settings import SMALLEST

PEAK = 255.0


def grey8(image: Tensor) -> Tensor:
    """[B,1,H,W] or [B,3,H,W], float in 0..1 -> uint8 [B,H,W]: the luminance, rounded once."""
    grey = image if image.shape[1] == 1 else luminance(image)
    return (grey[:, 0] * PEAK).round().clamp(0, PEAK).byte()


def fusion_metrics(
    infrared: Tensor, visible: Tensor, fused: Tensor, names: Sequence[str] | None = None, qabf: str = "reference"
) -> dict[str, Tensor]:
    """Name -> float64 [B] of uint8 [B,H,W] pictures. `names`: out of METRICS, all of them by default.

    Raises UsageError for other shapes or types, sides below 41 pixels, or names that do not exist.
    """
    names = tuple(METRICS) if names is None else tuple(names)
    _check(infrared, visible, fused, names, qabf)
    trio = torch.stack([x for x in (infrared, visible, fused)]).double()
    special = {"EN": lambda: entropy(fused), "MI": lambda: mutual_information(infrared, visible, fused),
               "Qabf": lambda: edge_transfer(trio, qabf)}  # fmt: skip
    return {name: special[name]() if name in special else METRICS[name](trio) for name in names}


def _check(infrared: Tensor, visible: Tensor, fused: Tensor, names: Sequence[str], qabf: str) -> None:
    given = [f"{list(x.shape)} {x.dtype}" for x in (infrared, visible, fused)]
    if len({x.shape for x in (infrared, visible, fused)}) > 1 or infrared.dim() != 3:
        raise UsageError(f"Fusion metrics take three stacks [B,H,W] of one size; got {', '.join(given)}.")
    if any(x.dtype != torch.uint8 for x in (infrared, visible, fused)):
        raise UsageError(f"Fusion metrics take uint8 pictures, as grey8 makes them; got {', '.join(given)}.")
    if min(infrared.shape[1:]) < SMALLEST:
        raise UsageError(f"Fusion metrics need sides of {SMALLEST} pixels or more; got {given[0]}.")
    if unknown := sorted(set(names) - set(METRICS)):
        raise UsageError(f"There is no metric {', '.join(unknown)}; choose from {', '.join(METRICS)}.")
    if qabf not in ("reference", "interior"):
        raise UsageError(f"There is no Qabf mode {qabf!r}; choose reference or interior.")


def entropy(pictures: Tensor) -> Tensor:
    """EN = -Σ p log2 p over 256 levels, in bits: uint8 [B,H,W] -> [B]."""
    return _bits(_histogram(pictures.flatten(1).long(), 256))


def mutual_information(infrared: Tensor, visible: Tensor, fused: Tensor) -> Tensor:
    """MI = I(f;a) + I(f;b) over 256 x 256 levels, in bits: uint8 [B,H,W] each -> [B]."""
    pictures = [x.flatten(1).long() for x in (infrared, visible, fused)]
    alone = [_bits(_histogram(x, 256)) for x in pictures]
    joint = [_bits(_histogram(256 * x + pictures[2], 256**2)) for x in pictures[:2]]
    return sum(h + alone[2] - both for h, both in zip(alone[:2], joint, strict=True))


def _histogram(levels: Tensor, count: int) -> Tensor:
    """Shares [B,count] of integer levels [B,N]."""
    offset = count * torch.arange(len(levels), device=levels.device)[:, None]
    counts = torch.bincount((levels + offset).flatten(), minlength=count * len(levels))
    return counts.view(len(levels), count).double() / levels.shape[1]


def _bits(shares: Tensor) -> Tensor:
    return -torch.special.xlogy(shares, shares).sum(1) / math.log(2)


def deviation(trio: Tensor) -> Tensor:
    """SD: the population standard deviation of f. trio: a, b, f as float64 [3,B,H,W]; so below."""
    return trio[2].flatten(1).std(1, correction=0)


def spatial_frequency(trio: Tensor) -> Tensor:
    """SF = √(mean squared horizontal + mean squared vertical difference of neighbours) of f."""
    across, down = trio[2].diff(dim=2), trio[2].diff(dim=1)
    return (across.square().mean((1, 2)) + down.square().mean((1, 2))).sqrt()


def average_gradient(trio: Tensor) -> Tensor:
    """AG = mean √((gx² + gy²) / 2) of f, with central differences, one-sided at the edges."""
    down, across = torch.gradient(trio[2], dim=(1, 2))
    return ((across.square() + down.square()) / 2).sqrt().mean((1, 2))


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's r of [B,H,W] each -> [B]; 0 where one of them is flat."""
    x, y = (z - z.mean((1, 2), keepdim=True) for z in (x, y))
    norm = (x.square().sum((1, 2)) * y.square().sum((1, 2))).sqrt()
    return torch.where(norm > 1e-9, (x * y).sum((1, 2)) / norm.clamp_min(1e-9), 0.0)


def differences_correlation(trio: Tensor) -> Tensor:
    """SCD = r(f - b, a) + r(f - a, b), in [-2, 2]."""
    a, b, f = trio
    return correlation(f - b, a) + correlation(f - a, b)


def mean_correlation(trio: Tensor) -> Tensor:
    """CC = (r(a, f) + r(b, f)) / 2."""
    a, b, f = trio
    return (correlation(a, f) + correlation(b, f)) / 2


def peak_signal_to_noise(trio: Tensor) -> Tensor:
    """PSNR = 10 log10(255² / MSE) in dB, MSE the mean of both sources'; infinite when all three are equal."""
    error = (trio[:2] - trio[2]).square().mean((0, 2, 3))
    return 10 * torch.log10(PEAK**2 / error)


def structural_similarity(trio: Tensor) -> Tensor:
    """SSIM(a, f) + SSIM(b, f)."""
    mean, variance, shared = _moments(trio, gaussian_taps(11, 1.5))
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    total = 0.0
    for i in (0, 1):
        likeness = (2 * mean[i] * mean[2] + c1) * (2 * shared[i] + c2)
        scale = (mean[i].square() + mean[2].square() + c1) * (variance[i] + variance[2] + c2)
        total = total + (likeness / scale).mean((1, 2))
    return total


def _moments(trio: Tensor, taps: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Local means and variances [3,B,h,w] of all three, and the covariances [2,B,h,w] of a and b with f."""
    products = torch.cat([trio, trio.square(), trio[:2] * trio[2]])
    filtered = filter_valid(products, taps)
    mean = filtered[:3]
    return mean, filtered[3:6] - mean.square(), filtered[6:] - mean[:2] * mean[2]


def visual_information(trio: Tensor, noise: float = 2.0) -> Tensor:
    """VIF(a -> f) + VIF(b -> f): information about each source over four scales (Sheikh and Bovik 2006, pixel domain).

    Windows 17, 9, 5, 3 with σ = size / 5, where they fit; `noise` is the variance of the eye's own.
    """
    told, present = information(trio, noise)
    return ((told + 1e-10) / (present + 1e-10)).sum(0)  # a flat source holds nothing to lose: 1


def information(trio: Tensor, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    """Per source and picture, [2,B] each: what f tells of it, and what there is to tell; the sums of VIF."""
    told, present = 0.0, 0.0
    for size in (17, 9, 5, 3):
        taps = gaussian_taps(size, size / 5)
        if size < 17:
            trio = filter_valid(trio, taps)[..., ::2, ::2]
        _, variance, shared = _moments(trio, taps)
        told_here, present_here = _at_one_scale(variance.clamp_min(0), shared, noise)
        told, present = told + told_here, present + present_here
    return told, present


def _at_one_scale(variance: Tensor, shared: Tensor, noise: float, tiny: float = 1e-10) -> tuple[Tensor, Tensor]:
    """`information` of one scale (in decades; the unit cancels)."""
    source, fused = variance[:2], variance[2]
    gain = torch.where((source < tiny) | (fused < tiny), 0.0, shared / (source + tiny))
    left = torch.where(fused < tiny, 0.0, fused - gain * shared)
    left = torch.where(gain < 0, fused, left).clamp_min(tiny)
    gain, source = gain.clamp_min(0), torch.where(source < tiny, 0.0, source)
    told = torch.log10(1 + gain.square() * source / (left + noise)).sum((2, 3))
    return told, torch.log10(1 + source / noise).sum((2, 3))


def edge_transfer(trio: Tensor, mode: str = "reference") -> Tensor:
    """Qabf: how much of the sources' edge strength and direction f keeps, weighed by their strength; below 0.975."""
    across, down = sobel(trio, "zero" if mode == "reference" else "valid")
    strength = (across.square() + down.square()).sqrt()  # hypot takes several times as long
    angle = torch.where(across == 0, math.pi / 2, torch.atan(down / across))
    kept = 0.0
    for i in (0, 1):
        low, high = torch.minimum(strength[i], strength[2]), torch.maximum(strength[i], strength[2])
        ratio = torch.where(high > 0, low / high.clamp_min(1e-12), 1.0)
        turn = 1 - (angle[i] - angle[2]).abs() / (math.pi / 2)
        kept = kept + (edge_quality(ratio, turn) * strength[i]).sum((1, 2))
    return kept / strength[:2].sum((0, 2, 3)).clamp_min(1e-12)


def edge_quality(ratio: Tensor, turn: Tensor) -> Tensor:
    """Qabf's quality of an edge by how much of its strength (0..1) and direction (1: all) is kept."""
    return 0.9994 / (1 + torch.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + torch.exp(-22 * (turn - 0.8)))


METRICS: dict[str, Callable[..., Tensor]] = {
    "EN": entropy,
    "SD": deviation,
    "SF": spatial_frequency,
    "AG": average_gradient,
    "MI": mutual_information,
    "SCD": differences_correlation,
    "CC": mean_correlation,
    "PSNR": peak_signal_to_noise,
    "SSIM": structural_similarity,
    "VIF": visual_information,
    "Qabf": edge_transfer,
}
