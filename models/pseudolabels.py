"""Which parts of a label still hold for a picture: the prototype filter APF of Syn4Seg (spec §2.2, §2.4, §2.5).

A region r is an 8-connected component of one class. Its mean feature v(r) is compared with the class prototype μ_k,
s(r) = cos(v(r), μ_k), and the region is freed (255) where s(r) < λ_k: where the label came with the picture from
elsewhere, such as from the infrared frame that a translator started from, its object is not to be seen there.

Features of a translated picture are not those of an infrared one. Three settings carry the comparison over:
`pixel_norm` gives each cell unit length, so that strong ones do not drown the rest; `centre` subtracts the mean feature
of each domain (the kind of picture) from prototypes and regions, so that a shift common to all its pixels cancels;
λ "auto" is calibrated on the regions of real frames, with a slack for the domain gap (§2.2).

Legend: H x W pixels, h x w feature cells, R regions, C channels, K classes + background. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage import measure
from torch import Tensor
from torch.nn.functional import normalize

from models.errors import UsageError

IGNORE = 255
SCOPES = ("foreground", "all")
AREA_AT = 473 * 473  # min_area is given in pixels of a 473 x 473 label


@dataclass(frozen=True)
class RefineSettings:
    """How labels are checked against pictures.

    layers: the synthetic pictures to check; those that were not made are passed over. scope: "foreground" (only
    classes may be freed), "all" (background, too), or class ids. lam: "auto", or one similarity in [-1, 1] for all
    classes. quantile, slack, floor, ceiling: λ_k = quantile of real regions - slack, within floor and ceiling.
    fallback: λ of a class with fewer than min_regions of them. min_area: smaller regions of the scope are freed; pixels
    of a 473 x 473 label, scaled to the frame (0: keep them). level: which encoder features. size: the encoder's input
    [H, W]. frames: most real frames read for prototypes and λ; mean_frames: most frames for the mean of a layer.

    The spec's floor 0.3 and fallback 0.6 are for plain cosines. With `centre` a cosine of 0 already means "no nearer to
    the class than the average pixel", so the scale is another one. On MSRS, with its aligned visible pictures in
    place of translated ones: these defaults keep 94 % of the pixels of true labels and free 37 % of the misplaced
    regions, alike in all domains; plain cosines rank true cars below misplaced ones. The ceiling is ours: where real
    objects are all alike (drawn ones, random weights) the quantile nears 1, and any domain gap would free every region.
    """

    layers: tuple[str, ...] = ("lightness", "rgb", "rgb_lightness")
    scope: str | tuple[int, ...] = "foreground"
    lam: str | float = "auto"
    quantile: float = 0.05
    slack: float = 0.1
    floor: float = 0.2
    ceiling: float = 0.5
    fallback: float = 0.3
    min_regions: int = 8
    min_area: int = 64
    pixel_norm: bool = True
    centre: bool = True
    level: str = "mid"
    size: tuple[int, int] = (360, 480)
    frames: int = 400
    mean_frames: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.scope, str) and self.scope not in SCOPES:
            raise UsageError(f"There is no scope {self.scope!r}; choose {', '.join(SCOPES)}, or class ids.")
        if isinstance(self.lam, str) and self.lam != "auto":
            raise UsageError(f"lam is 'auto' or a number in [-1, 1], not {self.lam!r}.")


@dataclass(frozen=True)
class Regions:
    """The regions of one label: `index` int64 [H, W] in 0..R-1; class_id and area (pixels) int64 [R];
    box int64 [R, 4] (top, left, bottom, right; the last two exclusive)."""

    index: np.ndarray
    class_id: np.ndarray
    area: np.ndarray
    box: np.ndarray


@dataclass(frozen=True)
class Filtered:
    """A label [H, W] after APF, its regions, their similarity to the prototype of their class ([R], NaN where the
    class has none) and whether each was kept ([R] bool)."""

    label: np.ndarray
    regions: Regions
    similarity: np.ndarray
    keep: np.ndarray


def find_regions(label: np.ndarray) -> Regions:
    """8-connected components of equal class, all classes at once (background and 255 have regions, too)."""
    ids = measure.label(label.astype(np.int32), background=-1, connectivity=2)
    boxes = [[r.start, c.start, r.stop, c.stop] for r, c in ndimage.find_objects(ids)]
    index = ids.astype(np.int64) - 1
    class_id = np.zeros(len(boxes), dtype=np.int64)
    class_id[index.ravel()] = label.ravel()
    return Regions(index, class_id, np.bincount(index.ravel(), minlength=len(boxes)), np.array(boxes, dtype=np.int64))


def pool_regions(index: np.ndarray, features: Tensor) -> Tensor:
    """Mean feature [R, C] of each region of `index` [H, W] (0..R-1) over `features` [C, h, w].

    Exact: every pixel takes the cell it lies in, so the result is the mean over nearest-upsampled features, and a
    region smaller than a cell keeps its own. (Downsampling the ids instead loses a fifth of the regions at stride 8.)
    Region x cell counts come from unique(id · hw + cell), O(HW + nnz · C).
    """
    channels, *grid = features.shape
    rows, columns = (((2 * np.arange(side) + 1) * n) // (2 * side) for side, n in zip(index.shape, grid, strict=True))
    cell = rows[:, None] * grid[1] + columns[None, :]
    pairs, counts = np.unique(index * (grid[0] * grid[1]) + cell, return_counts=True)
    region, cell = (torch.from_numpy(x) for x in np.divmod(pairs, grid[0] * grid[1]))
    weight = torch.from_numpy(counts).to(features.dtype)
    total = int(index.max()) + 1
    sums = features.new_zeros(total, channels)
    sums.index_add_(0, region, features.flatten(1).T[cell] * weight[:, None])
    return sums / features.new_zeros(total).index_add_(0, region, weight)[:, None]


def unit_features(features: Tensor, settings: RefineSettings) -> Tensor:
    """f̂: features [C, h, w] of one picture, each cell at unit length when `pixel_norm` is on."""
    features = features.float()
    return normalize(features, dim=0) if settings.pixel_norm else features


def class_prototypes(class_id: Tensor, area: Tensor, vectors: Tensor, classes: int, mean: Tensor | None) -> Tensor:
    """μ̂ [K + 1, C]: the masked mean of f̂ over all pixels of a class, at unit length; zeros for an absent class.

    From the regions of real frames: class_id and area (pixels) [R], vectors [R, C] of `pool_regions`. Σ area · v(r) is
    the sum over pixels, so this is Σ_j Σ_p 1[M_j(p) = k] f_j(p) / Σ_j Σ_p 1[M_j(p) = k] with the masks at full
    resolution: no object vanishes at stride 8. `mean` [C] of the domain is taken off.
    """
    sums, pixels = _class_sums(class_id, area, vectors, classes)
    return _directions(sums, pixels, mean)


def left_out_similarities(
    frame: Tensor, class_id: Tensor, area: Tensor, vectors: Tensor, classes: int, mean: Tensor | None,
) -> Tensor:
    """s(r) [R] of real regions to the prototype of their class made without their own frame (leave one out).

    `frame` [R] numbers the frames. NaN for 255 and for a class that no other frame shows.
    """
    sums, pixels = _class_sums(class_id, area, vectors, classes)
    pair, inverse = torch.unique(frame * (IGNORE + 1) + class_id, return_inverse=True)
    own, own_pixels = _class_sums(inverse, area, vectors, len(pair) - 1)
    known = class_id <= classes
    rows = class_id.where(known, torch.zeros_like(class_id))
    others = _directions(sums[rows] - own[inverse], (pixels[rows] - own_pixels[inverse]).round(), mean)
    similarity = (_directions(vectors.double(), torch.ones(len(vectors)), mean) * others).sum(1)
    return similarity.where(known & (others.abs().sum(1) > 0), torch.nan)


def _class_sums(class_id: Tensor, area: Tensor, vectors: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    known = class_id <= classes
    sums = torch.zeros(classes + 1, vectors.shape[1], dtype=torch.float64)
    sums.index_add_(0, class_id[known], vectors[known].double() * area[known].double()[:, None])
    return sums, torch.zeros(classes + 1, dtype=torch.float64).index_add_(0, class_id[known], area[known].double())


def _directions(sums: Tensor, pixels: Tensor, mean: Tensor | None) -> Tensor:
    """Unit rows of sums / pixels - mean; zeros where there are no pixels."""
    means = sums / pixels.clamp(min=1)[:, None] - (0 if mean is None else mean.double())
    return (normalize(means, dim=1) * (pixels > 0)[:, None]).float()


def calibrate(class_id: np.ndarray, similarity: np.ndarray, classes: int, settings: RefineSettings) -> np.ndarray:
    """λ [K + 1] of each class from the similarities [R] of regions in real frames.

    "auto": quantile - slack within floor and ceiling, or `fallback` for a class with fewer than `min_regions` of them.
    """
    if not isinstance(settings.lam, str):
        return np.full(classes + 1, float(settings.lam))
    thresholds = np.full(classes + 1, settings.fallback)
    for k in range(classes + 1):
        found = similarity[(class_id == k) & ~np.isnan(similarity)]
        if len(found) >= settings.min_regions:
            low = np.quantile(found, settings.quantile) - settings.slack
            thresholds[k] = np.clip(low, settings.floor, settings.ceiling)
    return thresholds


def large_enough(area: np.ndarray, pixels: int, settings: RefineSettings) -> np.ndarray:
    """Which areas [R] reach min_area in a label of `pixels` pixels."""
    return area >= settings.min_area * pixels / AREA_AT


def prototype_filter(
    label: np.ndarray, features: Tensor, prototypes: Tensor, thresholds: np.ndarray, settings: RefineSettings,
    mean: Tensor | None = None,
) -> Filtered:
    """APF: `label` uint8 [H, W] with the regions that disagree with the picture set to 255.

    `features` [C, h, w] of the picture, from `unit_features`; `mean` [C] of its domain; `prototypes` [K + 1, C];
    `thresholds` λ [K + 1]. Kept pixels never change; only classes of the scope are freed, and a class without a
    prototype is not judged. Regions below min_area are freed, because s(r) of a few pixels says nothing.
    """
    regions = find_regions(label)
    known = regions.class_id < len(prototypes)
    rows = np.where(known, regions.class_id, 0)
    vectors = pool_regions(regions.index, features)
    directions = _directions(vectors, torch.ones(len(vectors)), mean)
    similarity = (directions * prototypes[rows]).sum(1).double().numpy()
    judged = known & prototypes.any(1).numpy()[rows] & in_scope(regions.class_id, settings.scope)
    agrees = (similarity >= thresholds[rows]) & large_enough(regions.area, label.size, settings)
    keep = ~judged | agrees
    similarity[~known] = np.nan
    return Filtered(np.where(keep[regions.index], label, IGNORE).astype(label.dtype), regions, similarity, keep)


def in_scope(class_id: np.ndarray, scope: str | tuple[int, ...]) -> np.ndarray:
    """Which regions may be freed, bool [R]; 255 never."""
    if scope == "all":
        return class_id != IGNORE
    if scope == "foreground":
        return (class_id > 0) & (class_id != IGNORE)
    return np.isin(class_id, list(scope))


def freed_counts(before: np.ndarray, after: np.ndarray) -> dict[int, dict[str, int]]:
    """Class id -> {"kept": pixels, "freed": pixels} of a label and its filtered form."""
    counts = {}
    for k in np.unique(before[before != IGNORE]):
        of_class = before == k
        kept = int(np.count_nonzero(after[of_class] == k))
        counts[int(k)] = {"kept": kept, "freed": int(np.count_nonzero(of_class)) - kept}
    return counts


def carry_freed(seen: np.ndarray, label: np.ndarray, refined: np.ndarray, novel: Iterable[int]) -> np.ndarray:
    """The label that training may see for a synthetic picture.

    Pseudo-label files hold every class and are the same for all folds. So training takes `seen`, the real label under
    its fold's policy (`models.episode.train_label`), and adds 255 only where `refined` freed a region of the real
    `label`; regions of novel classes are passed over, or their outline would show through the policy "background".
    """
    freed = (refined == IGNORE) & ~np.isin(label, list(novel))
    return np.where(freed, IGNORE, seen).astype(seen.dtype)
