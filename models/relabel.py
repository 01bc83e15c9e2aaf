"""What the filter freed, labelled anew where the features say clearly what is there: APR of Syn4Seg (spec §2.3, §2.5).

Per picture, each class k has a mixed prototype μ̃_k = norm(β μ̂_k + (1 - β) μ̂_k^(x)), of the prototype of the supports
and the mean of f̂ over the pixels that the picture kept. A free pixel takes the class with the largest
q_k = softmax_k(f̂(p) · μ̃_k / T) if q >= τ and its lead over the second is >= m; else it stays 255.

f̂(p) is the bilinear upsampling of f̂, as the networks' own logits are. It is linear, so products with the prototypes are
taken on the grid and upsampled, K numbers a pixel and not C: exact, and fast enough for a CPU.

Legend: H x W pixels, h x w feature cells, C channels, K classes + background, P free pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.errors import UsageError
from models.pseudolabels import IGNORE

BACKGROUNDS = ("local", "mixed")


@dataclass(frozen=True)
class RelabelSettings:
    """beta: β, the weight of the supports' prototype. temperature: T. tau: τ, the least share. margin: m.

    passes: more than one refreshes the local prototypes with what was relabelled. min_pixels: a class with fewer kept
    pixels has no local prototype. background: "local" (its own mean alone where it has one: a background prototype of
    other pictures says little) or "mixed" like any class. min_target, max_ignored: shares of the picture that make it
    fit for training (`accept`).
    """

    beta: float = 0.5
    temperature: float = 0.1
    tau: float = 0.8
    margin: float = 0.1
    passes: int = 1
    min_pixels: int = 16
    background: str = "local"
    min_target: float = 0.005
    max_ignored: float = 0.6

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise UsageError(f"There is no background {self.background!r}; choose {' or '.join(BACKGROUNDS)}.")
        if not 0 <= self.beta <= 1 or self.temperature <= 0 or self.passes < 1:
            raise UsageError("beta lies in [0, 1], temperature above 0, passes from 1 on; correct the settings.")


class Grid:
    """Bilinear upsampling (half-pixel centres) from h x w cells to H x W pixels, pixel by pixel.

    cells int64 [4, H, W] and weights float32 [4, H, W]: the four cells that each pixel is mixed from.
    """

    def __init__(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        (top, bottom, down), (left, right, across) = (_axis(n, m) for n, m in zip(size, grid, strict=True))
        width = grid[1]
        rows, columns = (top * width, bottom * width), (left, right)
        self.cells = np.stack([r[:, None] + c[None] for r in rows for c in columns])
        self.weights = np.stack([a[:, None] * b[None] for a in (1 - down, down) for b in (1 - across, across)])
        self.count = grid[0] * grid[1]

    def upsample(self, values: np.ndarray, where: np.ndarray) -> np.ndarray:
        """values [h · w, K] at the pixels of `where` bool [H, W] -> [P, K]."""
        return sum(w[where][:, None] * values[c[where]] for c, w in zip(self.cells, self.weights, strict=True))

    def collect(self, index: np.ndarray, count: int) -> np.ndarray:
        """How much of each cell the pixels of each index (int [H, W] < count) are made of: float64 [count, h · w]."""
        total = np.zeros(count * self.count)
        for cells, weights in zip(self.cells, self.weights, strict=True):
            total += np.bincount((index * self.count + cells).ravel(), weights.ravel(), len(total))
        return total.reshape(count, self.count)


def _axis(side: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower cell, upper cell, share of the upper one) of each pixel along one side."""
    place = np.clip((np.arange(side) + 0.5) * cells / side - 0.5, 0, None)
    lower = np.minimum(place.astype(np.int64), cells - 1)
    return lower, np.minimum(lower + 1, cells - 1), (place - lower).astype(np.float32)


@dataclass(frozen=True)
class Relabelled:
    """A label [H, W] after APR, the prototypes [K, C] it used, and which classes were candidates ([K] bool)."""

    label: np.ndarray
    prototypes: Tensor
    candidates: np.ndarray


def relabel(
    label: np.ndarray, features: Tensor, prototypes: Tensor, settings: RelabelSettings, prompted: Iterable[int] = (),
    mean: Tensor | None = None,
) -> Relabelled:
    """APR: `label` uint8 [H, W] with free pixels (255) labelled where the picture's features are clear.

    features [C, h, w] of `unit_features`; prototypes μ̂ [K, C] at unit length, zeros for a class without one; prompted:
    classes that the picture was asked to show; mean [C] of the features' domain, taken off each cell. Candidates are
    the background, the classes that kept pixels, and the prompted ones. Kept labels never change.
    """
    rows = _unit_rows(features, mean)
    grid, out = Grid(label.shape, tuple(features.shape[-2:])), label
    for _ in range(settings.passes):
        mixed, candidates = mixed_prototypes(out, rows, prototypes, settings, prompted, grid)
        free = out == IGNORE
        if not free.any() or not candidates.any():
            break
        out = _fill(out, free, rows @ mixed.T, candidates, settings, grid)
    kept = label != IGNORE
    assert (out[kept] == label[kept]).all(), "a kept label changed"
    assert candidates[np.setdiff1d(out, [*np.unique(label[kept]), IGNORE])].all(), "a label that was no candidate"
    return Relabelled(out, mixed, candidates)


def _unit_rows(features: Tensor, mean: Tensor | None) -> Tensor:
    """f̂ as rows [h · w, C]; with a mean, each cell less it and at unit length again."""
    rows = features.float().flatten(1).T
    return rows if mean is None else normalize(rows - mean, dim=1)


def mixed_prototypes(
    label: np.ndarray, rows: Tensor, prototypes: Tensor, settings: RelabelSettings, prompted: Iterable[int], grid: Grid,
) -> tuple[Tensor, np.ndarray]:
    """μ̃ [K, C] of one picture, and the candidates [K] bool: those of C_x that have a prototype at all."""
    count = len(prototypes)
    index = np.where(label < count, label, count).astype(np.int64)
    pixels = np.bincount(index.ravel(), minlength=count + 1)[:count]
    weights = torch.from_numpy(grid.collect(index, count + 1)[:count]).float()
    local = normalize(weights @ rows, dim=1)
    known = torch.from_numpy(pixels >= settings.min_pixels)[:, None]
    beta = torch.full((count, 1), settings.beta)
    beta[0] = 0.0 if settings.background == "local" else settings.beta
    beta[~prototypes.any(1)] = 0.0
    mixed = torch.where(known, normalize(beta * prototypes + (1 - beta) * local, dim=1), prototypes)
    wanted = (pixels > 0) | np.isin(np.arange(count), [0, *prompted])
    return mixed, wanted & mixed.any(1).numpy()


def _fill(
    label: np.ndarray, free: np.ndarray, products: Tensor, candidates: np.ndarray, settings: RelabelSettings,
    grid: Grid,
) -> np.ndarray:
    """The label with the free pixels that are clear; products [h · w, K] of f̂ with the prototypes."""
    ids = np.flatnonzero(candidates)
    scores = torch.from_numpy(grid.upsample(products[:, ids].numpy(), free))
    shares = (scores / settings.temperature).softmax(1)
    best, second = _two_largest(shares)
    clear = (best >= settings.tau) & (best - second >= settings.margin)
    out = label.copy()
    out[free] = np.where(clear.numpy(), ids[shares.argmax(1).numpy()], IGNORE)
    return out


def _two_largest(shares: Tensor) -> tuple[Tensor, Tensor]:
    if shares.shape[1] == 1:
        return shares[:, 0], torch.zeros_like(shares[:, 0])
    best, second = shares.topk(2, dim=1).values.T
    return best, second


def accept(label: np.ndarray, target: int, settings: RelabelSettings) -> str:
    """"ok", "no_target" (the prompted class is too small) or "mostly_ignored": whether training may see a picture."""
    if np.count_nonzero(label == target) < settings.min_target * label.size:
        return "no_target"
    return "mostly_ignored" if np.count_nonzero(label == IGNORE) > settings.max_ignored * label.size else "ok"
