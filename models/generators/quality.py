"""How good translations are, found before anything is trained on them: realistic, aligned, and of the same content.

    kid, fid        do they look like real pictures of the target domain, to a frozen encoder (sets, never pairs)?
    edge_scores     are the edges where the source has them (pairs)?
    agreement       does a frozen segmenter see the same things in both (pairs)?

KID is the squared maximum mean discrepancy under the kernel (x·y / c + 1)³ (Bińkowski et al., "Demystifying MMD GANs",
ICLR 2018, arXiv 1801.01401). Its estimate is unbiased for any number of pictures and may fall below 0, so it is what to
read of a hundred held-out frames; FID (Heusel et al., NeurIPS 2017, arXiv 1706.08500) is biased upwards in small sets
and compares only sets of one size. The papers' encoder is Inception v3; with another one the numbers compare with each
other and with nothing outside.

Legend: N, M pictures, c channels, B batch, h x w feature cells, C classes with background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize, one_hot

from models.backbone import Encoder, Features
from models.errors import UsageError
from models.generators.pictures import edge_agreement
from models.geometry import Canvas, as_image
from models.views import encode

IGNORE = 255
FEWEST = 3  # pictures of a set: leaving one out has to leave a pair


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


# ---- two sets


def descriptors(features: Features) -> Tensor:
    """One vector per picture, [B,c]: the mean of the encoder's high level."""
    return features.high.double().mean((2, 3))


def kid(made: Tensor, real: Tensor) -> Interval:
    """KID of descriptors [N,c] and [M,c], with an interval from leaving out one picture of either set at a time.

    The interval holds the pictures for independent: frames of one video are not, and make it too narrow. Raises
    UsageError for sets of fewer than FEWEST.
    """
    _check(made, real)
    within_made, within_real, between = _kernel(made, made), _kernel(real, real), _kernel(made, real)
    rows, columns = (k.fill_diagonal_(0).sum(1) for k in (within_made, within_real))
    n, m = len(made), len(real)
    value = _discrepancy(rows.sum(), columns.sum(), between.sum(), n, m)
    without_made = _discrepancy(rows.sum() - 2 * rows, columns.sum(), between.sum() - between.sum(1), n - 1, m)
    without_real = _discrepancy(rows.sum(), columns.sum() - 2 * columns, between.sum() - between.sum(0), n, m - 1)
    half = 1.96 * (_jackknife(without_made) + _jackknife(without_real)) ** 0.5
    return Interval(float(value), float(value) - half, float(value) + half)


def fid(made: Tensor, real: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to descriptors [N,c] and [M,c].

    tr (S_1 S_2)^½ is the nuclear norm of X_1 X_2ᵀ, where S = XᵀX: exact also when c exceeds N and M, and no root of a
    singular matrix is taken. Raises UsageError for sets of fewer than FEWEST.
    """
    _check(made, real)
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (made.double(), real.double())]
    spread = sum(x.square().sum() for x in centred)
    shift = (made.double().mean(0) - real.double().mean(0)).square().sum()
    return float(shift + spread - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum())


def _check(made: Tensor, real: Tensor) -> None:
    if min(len(made), len(real)) < FEWEST:
        raise UsageError(f"Got {len(made)} made and {len(real)} real pictures; give at least {FEWEST} of each.")


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def _discrepancy(made: Tensor, real: Tensor, between: Tensor, n: int, m: int) -> Tensor:
    """From the sums of kernel values within (without the diagonal) and between sets of n and m."""
    return made / (n * (n - 1)) + real / (m * (m - 1)) - 2 * between / (n * m)


def _jackknife(values: Tensor) -> float:
    """The variance of an estimate from its values with one item left out."""
    return float((len(values) - 1) * values.var(unbiased=False))


# ---- pairs


def edge_scores(sources: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> np.ndarray:
    """float [N] in 0..1, of pairs uint8 [H,W] or [H,W,3]: 1 for the same edges, of whatever polarity, 0 for unrelated.

    The correlation of the gradients at doubled angles (`pictures.edge_agreement`), edges at right angles counted as 0.
    """
    scores = [edge_agreement(source, output) for source, output in zip(sources, outputs, strict=True)]
    return np.clip(scores, 0, 1)


def agreement(segment: Callable[[Any], Tensor], sources: Any, outputs: Any, classes: int) -> Tensor:
    """How often `segment` says i of a source and j of its translation: long [C,C], to be added up over batches.

    segment takes a batch of whatever kind and returns class ids long [B,h,w] in 0..C-1, 255 where it does not know.
    """
    said, again = segment(sources).flatten(), segment(outputs).flatten()
    known = (said != IGNORE) & (again != IGNORE)
    return torch.bincount(said[known] * classes + again[known], minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """The mean over classes of IoU = both / either, in 0..1, from counts of `agreement`; NaN when nothing was seen.

    A class that is seen in neither enters no mean.
    """
    both, either = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((both[either > 0] / either[either > 0]).mean()) if either.any() else float("nan")


def same_share(counts: Tensor) -> float:
    """The share of cells that are given the same class; NaN when nothing was seen."""
    return float(counts.trace() / counts.sum()) if counts.any() else float("nan")


class PrototypeSegmenter:
    """A segmenter that needs no training: each cell takes the class whose mean feature on real frames is the nearest.

    Cells have unit length and are centred by the mean of their own picture, so that a change of tone that all of a
    picture shares is no disagreement. prototypes: [C,c], zeros for a class that no frame shows; it is never said.
    """

    def __init__(self, prototypes: Tensor, level: str = "mid") -> None:
        self.prototypes, self.level = prototypes, level

    @classmethod
    def fit(
        cls, encoder: Encoder, canvas: Canvas, examples: Iterable[tuple[np.ndarray, np.ndarray]], classes: int,
        level: str = "mid",
    ) -> PrototypeSegmenter:
        """examples: (picture uint8 [H,W] or [H,W,3], label uint8 [H,W] of 0..C-1 and 255), one encoded at a time."""
        sums = torch.zeros(classes, encoder.channels[("low", "mid", "high").index(level)], dtype=torch.float64)
        for picture, label in examples:
            cells = _cells(getattr(encode_pictures(encoder, canvas, [picture]), level))[0].double().cpu()
            of_class = one_hot(torch.from_numpy(label).long().clamp(max=classes), classes + 1)[..., :classes]
            shares = adaptive_avg_pool2d(of_class.permute(2, 0, 1).double(), cells.shape[1:])
            sums += torch.einsum("khw,chw->kc", shares, cells)
        return cls(normalize(sums, dim=1).float(), level)

    def __call__(self, features: Features) -> Tensor:
        """Class ids long [B,h,w] of the encoder's features of B pictures; 255 throughout when there is no class."""
        cells = _cells(getattr(features, self.level))
        prototypes = self.prototypes.to(cells)
        shown = prototypes.any(1)
        if not shown.any():
            return torch.full((len(cells), *cells.shape[2:]), IGNORE, device=cells.device)
        similarity = torch.einsum("kc,bchw->bkhw", prototypes, cells)
        return similarity.masked_fill(~shown[:, None, None], -torch.inf).argmax(1)


def encode_pictures(encoder: Encoder, canvas: Canvas, pictures: Sequence[np.ndarray]) -> Features:
    """Levels [B,c,h,w] of pictures uint8 [H,W] or [H,W,3] of any sizes, on the encoder's device."""
    images = torch.stack([canvas.image(as_image(picture)) for picture in pictures])
    return encode(encoder, images.to(encoder.mean.device))


def _cells(features: Tensor) -> Tensor:
    unit = normalize(features.float(), dim=1)
    return unit - unit.mean((2, 3), keepdim=True)
