"""Few-shot episodes from unlabelled frames: one region of one frame is one pseudo-class.

Self-supervision by superpixels (Ouyang et al., "Self-Supervision with Superpixels: Training Few-shot Medical Image
Segmentation without Annotation", ECCV 2020, arXiv 2007.09886): the support is the frame with the region as its mask,
the query the same frame moved (affine) and with other tones, its mask moved along. A learner that finds the region
again has learnt to compare, and no label was read. Besides superpixels there are blobs: what is warmer or colder than
its surroundings, which in infrared is what an object is, whatever its class.

    regions = find_regions(picture, settings)                         # slow; keep it
    made = episode(picture, regions, seed, id, number, settings)      # fast

Region, movement and mask depend on (seed, id, number) and the regions only, never on the picture: call `episode` again
with another layer of the frame (its translation to RGB) and the two fit to the pixel.

Legend: H x W pixels, K kinds, R regions (numbered 1..R over all kinds).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from scipy import ndimage
from skimage import measure
from skimage.segmentation import felzenszwalb
from skimage.transform import resize

from models.errors import UsageError

IGNORE = 255
FAINTEST = 0.08


@dataclass(frozen=True)
class PseudoSettings:
    """How regions are found, and how a query differs from its support.

    kinds: names of KINDS. scale: superpixels grow with it (felzenszwalb; 100 in the paper).
    contrast: a blob differs by this many robust deviations from its surroundings.
    min_area, max_area: of a region, as shares of the frame. compactness: least 4π area / perimeter² (a disc has 1).

    Ranges of the query's movement and tones, each drawn evenly between minus and plus the number: rotate and shear in
    degrees, shift as a share of the side, zoom, gamma and gain as natural logarithms of factors, offset in deviations
    of the picture; noise is the largest deviation of its noise, in the same unit. flip: its probability.
    keep, tries: share of the region that has to stay in the frame, and draws until the frame is left where it is.
    """

    kinds: tuple[str, ...] = ("superpixels", "blobs")
    scale: float = 100.0
    contrast: float = 2.0
    min_area: float = 0.002
    max_area: float = 0.2
    compactness: float = 0.15
    rotate: float = 20.0
    shear: float = 8.0
    shift: float = 0.12
    zoom: float = 0.25
    flip: float = 0.5
    gamma: float = 0.35
    gain: float = 0.3
    offset: float = 0.3
    noise: float = 0.25
    keep: float = 0.6
    tries: int = 10

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise UsageError(f"Pseudo-classes have the kinds {', '.join(KINDS)}; choose some of them.")
        if not 0 < self.min_area < self.max_area <= 1:
            raise UsageError("min_area and max_area are shares of the frame, 0 < min_area < max_area <= 1.")


@dataclass(frozen=True)
class Regions:
    """index uint16 [K,H,W]: in the plane of each kind 0 or the number of a region; area int64 [R] in pixels;
    kind int64 [R], the plane of each."""

    index: np.ndarray
    area: np.ndarray
    kind: np.ndarray

    def __len__(self) -> int:
        return len(self.area)

    def mask(self, number: int) -> np.ndarray:
        """uint8 [H,W] of {0, 1}: region `number`, from 1."""
        return (self.index[self.kind[number - 1]] == number).astype(np.uint8)


@dataclass(frozen=True)
class PseudoEpisode:
    """support and query uint8 [H,W] or [H,W,3]; support_mask uint8 [H,W] of {0, 1}; query_mask uint8 [H,W] of
    {0, 1, 255}, 255 where the movement brought in pixels that no one has seen; region: its number, from 1."""

    support: np.ndarray
    support_mask: np.ndarray
    query: np.ndarray
    query_mask: np.ndarray
    region: int


# ---- regions


def find_regions(picture: np.ndarray, settings: PseudoSettings) -> Regions:
    """The regions of uint8 [H,W] that may serve as pseudo-classes; possibly none (a flat picture)."""
    stretched = _stretched(picture)
    planes, areas, kinds, first = [], [], [], 1
    for plane, kind in enumerate(settings.kinds):
        index, area = _filtered(KINDS[kind](stretched, settings), settings, first)
        planes.append(index)
        areas.append(area)
        kinds.append(np.full(len(area), plane))
        first += len(area)
    return Regions(np.stack(planes), np.concatenate(areas), np.concatenate(kinds))


def superpixels(picture: np.ndarray, settings: PseudoSettings) -> np.ndarray:
    """Felzenszwalb's graph segments of float [H,W] in 0..1 -> int [H,W], numbered from 1."""
    smallest = max(1, int(settings.min_area * picture.size))
    return felzenszwalb(picture, scale=settings.scale, sigma=0.8, min_size=smallest) + 1


def blobs(picture: np.ndarray, settings: PseudoSettings) -> np.ndarray:
    """Connected parts of float [H,W] that are warmer, or colder, than their surroundings -> int [H,W], 0: none.

    Surroundings are medians and their spread is 1.48 times the median deviation: objects hardly move either. A part
    differs by at least FAINTEST of the picture's range, whatever the spread.
    """
    difference = ndimage.gaussian_filter(picture, 1.0, mode="reflect") - _surroundings(picture)
    deviation = 1.48 * np.median(np.abs(difference - np.median(difference)))
    found = np.zeros(picture.shape, dtype=np.int64)
    for sign in (1, -1):
        apart = sign * difference > max(settings.contrast * deviation, FAINTEST)
        parts = measure.label(ndimage.binary_fill_holes(apart), connectivity=2)
        found = np.where((found == 0) & (parts > 0), parts + found.max(), found)
    return found


def _surroundings(picture: np.ndarray) -> np.ndarray:
    """The median of a window half as wide as the short side, found on a coarse grid: float [H,W]."""
    step = max(1, min(picture.shape) // 40)
    coarse = ndimage.gaussian_filter(picture, step / 2, mode="reflect")[::step, ::step]
    window = min(coarse.shape) // 2 | 1
    return resize(ndimage.median_filter(coarse, window, mode="reflect"), picture.shape, order=1)


KINDS: dict[str, Callable[[np.ndarray, PseudoSettings], np.ndarray]] = {"superpixels": superpixels, "blobs": blobs}


def _stretched(picture: np.ndarray) -> np.ndarray:
    """float [H,W] in 0..1 between the 1st and 99th percentile: a night's few grey levels fill the range."""
    low, high = np.percentile(picture, (1, 99))
    return ((picture - low) / max(high - low, 8.0)).clip(0, 1)


def _filtered(index: np.ndarray, settings: PseudoSettings, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Regions of the right size and shape, renumbered from `first`: uint16 [H,W] and their areas."""
    areas = np.bincount(index.ravel())
    shares = areas / index.size
    large = [n for n in np.flatnonzero((shares >= settings.min_area) & (shares <= settings.max_area)) if n]
    kept = [n for n in large if _compactness(index == n, areas[n]) >= settings.compactness]
    table = np.zeros(len(areas), dtype=np.uint16)
    table[kept] = np.arange(first, first + len(kept))
    return table[index], areas[kept]


def _compactness(mask: np.ndarray, area: int) -> float:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    cut = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    return 4 * np.pi * area / measure.perimeter(cut) ** 2


# ---- episodes


def episode(
    picture: np.ndarray, regions: Regions, seed: int, id: str, number: int, settings: PseudoSettings
) -> PseudoEpisode:
    """Episode `number` (0, 1, ...) of the frame `id`: uint8 [H,W] or [H,W,3] of the regions' size.

    Consecutive numbers go through all regions, in an order that (seed, id) decides, before one comes again. Raises
    UsageError for a frame without regions.
    """
    region, matrix, offset = plan(regions, seed, id, number, settings)
    mask = regions.mask(region)
    query = _toned(_moved(picture, matrix, offset), _generator(seed, id, number, "tones"), settings)
    return PseudoEpisode(picture, mask, query, move_label(mask, matrix, offset), region)


def plan(
    regions: Regions, seed: int, id: str, number: int, settings: PseudoSettings
) -> tuple[int, np.ndarray, np.ndarray]:
    """Which region episode `number` asks for, and (matrix [2,2], offset [2]) of the query's movement."""
    if not len(regions):
        raise UsageError(f"Frame {id} has no region to ask for; pass it over, or lower min_area or compactness.")
    order = _generator(seed, id, "order").permutation(len(regions)) + 1
    region = int(order[number % len(regions)])
    return region, *_movement(regions.mask(region), _generator(seed, id, number, "movement"), settings)


def _generator(*key: object) -> np.random.Generator:
    digest = blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _movement(
    mask: np.ndarray, rng: np.random.Generator, settings: PseudoSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(matrix [2,2], offset [2]) that take a pixel of the query to its place in the frame, keeping enough of `mask`."""
    places = np.argwhere(mask)
    size = np.array(mask.shape)
    for _ in range(settings.tries):
        matrix, offset = _drawn_affine(size, rng, settings)
        there = (places - offset) @ np.linalg.inv(matrix).T
        inside = ((there >= 0) & (there <= size - 1)).all(1)
        if inside.mean() >= settings.keep:
            return matrix, offset
    return np.eye(2), np.zeros(2)


def _drawn_affine(
    size: np.ndarray, rng: np.random.Generator, settings: PseudoSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Rotation, shear, scale, flip and shift about the middle of the frame; (row, column) coordinates."""
    s = settings
    angle, shear = np.radians(rng.uniform(-1, 1, 2) * (s.rotate, s.shear))
    cos, sin = np.cos(angle), np.sin(angle)
    flip = -1.0 if rng.random() < s.flip else 1.0
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, 0], [np.tan(shear), 1]]) @ np.diag([1.0, flip])
    matrix *= np.exp(rng.uniform(-s.zoom, s.zoom))
    middle = (size - 1) / 2
    return matrix, middle - matrix @ middle + rng.uniform(-s.shift, s.shift, 2) * size


def _moved(picture: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Bilinear, reflected beyond the border: float32 of the picture's shape."""
    planes = picture[..., None] if picture.ndim == 2 else picture
    moved = [ndimage.affine_transform(plane.astype(np.float32), matrix, offset, order=1, mode="reflect")
             for plane in np.moveaxis(planes, -1, 0)]
    return np.stack(moved, -1).reshape(picture.shape)


def move_label(mask: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """A mask or label map uint8 [H,W] moved as the query is; 255 where the movement brought in unseen pixels."""
    return ndimage.affine_transform(mask, matrix, offset, order=0, mode="constant", cval=IGNORE)


def _toned(picture: np.ndarray, rng: np.random.Generator, settings: PseudoSettings) -> np.ndarray:
    """Gamma, gain about the mean, offset and noise, the latter two in deviations of the picture -> uint8."""
    s = settings
    gamma, gain = np.exp(rng.uniform(-1, 1, 2) * (s.gamma, s.gain))
    offset, deviation = rng.uniform(-s.offset, s.offset), rng.uniform(0, s.noise)
    noise = rng.standard_normal(picture.shape[:2], dtype=np.float32)
    bent = 255 * (picture / 255).clip(0, 1) ** gamma
    mean, spread = bent.mean(), bent.std()
    noise = noise.reshape(noise.shape + (1,) * (picture.ndim - 2))
    return np.rint(mean + gain * (bent - mean) + spread * (offset + deviation * noise)).clip(0, 255).astype(np.uint8)
