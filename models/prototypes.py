"""Prototypes and thresholds of the novel classes from a few supports (Syn4Seg spec §2.1, §2.2).

λ_k is what the filter asks of a region of class k. With K supports there is no set of real regions to calibrate it on,
so each support is seen in many views (crop, scale, flip, photometric jitter), and λ_k is a low quantile of the cosines
of their regions with the prototype of k, less a slack for the gap between real and synthetic pictures. With two or
more supports a view is judged by the prototype of the others.

Legend: S supports, V views of each, R regions, C channels, K classes + background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.episode import number
from models.geometry import Augmentation, Canvas, as_image, augment
from models.pseudolabels import (
    RefineSettings,
    calibrate,
    class_prototypes,
    find_regions,
    large_enough,
    left_out_similarities,
    pool_regions,
)

SYN4SEG = RefineSettings(centre=False, floor=0.3, ceiling=1.0, fallback=0.6, min_regions=4)
"""The filter's settings for one domain, plain cosines: the spec's floor and fallback."""

Describe = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Support:
    """One support: its id, picture uint8 [H, W] or [H, W, 3], and label uint8 [H, W] (255 where it says nothing)."""

    id: str
    picture: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class ClassPrototypes:
    """prototypes μ̂ [K, C] at unit length, zeros for a class without one; thresholds λ [K]; similarity [R] and class_id
    [R] of the supports' views, of which λ was read."""

    prototypes: Tensor
    thresholds: np.ndarray
    similarity: np.ndarray
    class_id: np.ndarray


def support_prototypes(
    supports: Sequence[Support], describe: Describe, classes: int, canvas: Canvas,
    settings: RefineSettings = SYN4SEG, views: int = 32, seed: int = 0, augmentation: Augmentation | None = None,
) -> ClassPrototypes:
    """Prototypes of the supports as they are, λ from `views` random views of each.

    describe: an image float [3, H, W] in 0..1 of the canvas's size -> f̂ [C, h, w] on the CPU. No object vanishes at the
    stride: regions are pooled at full resolution. Regions below min_area take no part in λ.
    """
    seen = [_regions(describe, *_canvas(support, canvas)) for support in supports]
    frame, class_id, area, vectors = _joined(seen)
    prototypes = class_prototypes(class_id, area, vectors, classes - 1, None)
    if not isinstance(settings.lam, str):
        return ClassPrototypes(prototypes, calibrate(np.empty(0), np.empty(0), classes - 1, settings),
                               np.empty(0), np.empty(0, np.int64))
    jitter = augmentation or Augmentation(photometric_probability=0.5)
    drawn = [_regions(describe, *_view(support, canvas, jitter, number(seed, support.id, view)))
             for support in supports for view in range(views)]
    frame, class_id, area, vectors = _joined(drawn)
    similarity = view_similarities(frame // views, class_id, area, vectors, prototypes, classes - 1)
    similarity[~large_enough(area.numpy(), int(np.prod(canvas.size)), settings)] = np.nan
    return ClassPrototypes(prototypes, calibrate(class_id.numpy(), similarity, classes - 1, settings), similarity,
                           class_id.numpy())


def view_similarities(
    support: Tensor, class_id: Tensor, area: Tensor, vectors: Tensor, prototypes: Tensor, classes: int,
) -> np.ndarray:
    """Cosine [R] of each view's region with its class's prototype: of the other supports, or of its own if it has none
    beside it (one shot)."""
    left_out = left_out_similarities(support, class_id, area, vectors, classes, None)
    known = class_id <= classes
    own = torch.cosine_similarity(vectors, prototypes[class_id.where(known, torch.zeros_like(class_id))], dim=1)
    own = own.where(known & (own != 0), torch.nan)
    return torch.where(left_out.isnan(), own, left_out).double().numpy()


def _canvas(support: Support, canvas: Canvas) -> tuple[Tensor, np.ndarray]:
    label = canvas.label(torch.from_numpy(support.label)[None])[0].numpy()
    return canvas.image(as_image(support.picture)[None])[0], label


def _view(support: Support, canvas: Canvas, jitter: Augmentation, seed: int) -> tuple[Tensor, np.ndarray]:
    draws = torch.Generator().manual_seed(seed % 2**63)
    grey = (0,) if support.picture.ndim == 2 else ()
    streams, labels = as_image(support.picture)[None], torch.from_numpy(support.label)[None]
    image, label = augment(streams, labels, canvas, jitter, draws, infrared=grey)
    return image[0], label[0].numpy()


def _regions(describe: Describe, image: Tensor, label: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    regions = find_regions(label)
    class_id, area = torch.from_numpy(regions.class_id), torch.from_numpy(regions.area)
    return class_id, area, pool_regions(regions.index, describe(image))


def _joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    frame = torch.cat([torch.full((len(part[0]),), n) for n, part in enumerate(parts)])
    return (frame, *(torch.cat(column) for column in zip(*parts, strict=True)))
