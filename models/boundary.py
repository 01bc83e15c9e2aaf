"""Sharper outlines of a label, from a promptable segmenter: SABR of Syn4Seg (spec §3).

Each region of the scope asks the segmenter with its box and its innermost point. What comes back may change only the
editable pixels E = B ∪ {255}: B is the band around every edge of the label, 255 what is still free. In E

    1. a pixel takes the class of the accepted mask that claims it with the largest logit · quality;
    2. a pixel of an accepted region's own band (or free beside it) that no mask claims, and that its mask clearly
       denies (logit < -δ), becomes background if the band has any, else 255;
    3. every other pixel keeps its label.

Pixels outside E never change. Legend: H x W pixels, R regions that are asked, h x w low-resolution logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

from models.errors import UsageError
from models.pseudolabels import AREA_AT, IGNORE, Regions, find_regions, in_scope
from models.sam import BoxSegmenter, Masks, Prompts

POINTS = ("none", "pos", "pos_neg")
ACCEPTS = ("iou", "wsss")
PER = ("component", "class")
SIDE_AT = AREA_AT**0.5


@dataclass(frozen=True)
class BoundarySettings:
    """band: its half-width in pixels of a 473 x 473 label, scaled to the frame; a region keeps a core, its own half of
    the band is at most a quarter of √area. box_grow: share by which a box is grown, 2 pixels at least. points: "none",
    "pos" (the innermost point) or "pos_neg" (and the innermost of the rest of the box). multimask: three masks a box,
    of which the best by quality and overlap is taken. min_quality, min_iou: what a mask needs with accept "iou";
    "wsss" asks instead that most of the mask lies in the class, or that it holds 85 % of the class. shrink: δ.
    scope: "foreground" (or "all"), or class ids. min_area: smaller regions are not asked, scaled like the filter's.
    per: one box per "component" or per "class". chunk: masks that are upsampled at a time.
    """

    band: float = 5.0
    box_grow: float = 0.05
    points: str = "pos"
    multimask: bool = True
    min_quality: float = 0.7
    min_iou: float = 0.5
    accept: str = "iou"
    shrink: float = 2.0
    scope: str | tuple[int, ...] = "foreground"
    min_area: int = 64
    per: str = "component"
    chunk: int = 64

    def __post_init__(self) -> None:
        for value, known in ((self.points, POINTS), (self.accept, ACCEPTS), (self.per, PER)):
            if value not in known:
                raise UsageError(f"There is no {value!r}; choose one of {', '.join(known)}.")


@dataclass(frozen=True)
class Sharpened:
    """A label [H, W] after SABR and its regions that were asked: class_id, area, box (x0, y0, x1, y1), quality, iou
    (of the mask with the region), accepted. changed, ignored: shares of all pixels."""

    label: np.ndarray
    table: pd.DataFrame
    changed: float
    ignored: float


@dataclass(frozen=True)
class Asked:
    """The regions of one label that are asked: ids into `Regions`-like arrays, their masks and prompts."""

    index: np.ndarray
    class_id: np.ndarray
    area: np.ndarray
    box: np.ndarray
    prompts: Prompts

    def mask(self, r: int) -> np.ndarray:
        return self.index == r


# ---- where: the band


def band_width(size: tuple[int, int], settings: BoundarySettings) -> int:
    return max(1, round(settings.band * (size[0] * size[1]) ** 0.5 / SIDE_AT))


def band(label: np.ndarray, regions: Regions, width: int) -> np.ndarray:
    """B, bool [H, W]: pixels with another label within `width` (in a square window), both sides of every edge.

    The side of a region reaches ⌊√area / 4⌋ pixels at most, so that a thin object keeps a core.
    """
    reach = np.minimum(width, (np.sqrt(regions.area) / 4).astype(int))[regions.index]
    found, low, high = np.zeros(label.shape, bool), label, label
    for step in range(1, width + 1):
        low, high = ndimage.minimum_filter(low, 3), ndimage.maximum_filter(high, 3)
        found |= (low != high) & (reach >= step)
    return found


# ---- who is asked, and how


def ask(label: np.ndarray, regions: Regions, settings: BoundarySettings) -> Asked:
    """The regions (or classes) of the scope that are large enough, with a box and points each."""
    scope = "foreground" if settings.scope == "all" else settings.scope
    large = regions.area >= settings.min_area * label.size / AREA_AT
    chosen = np.flatnonzero(in_scope(regions.class_id, scope) & large)
    number = np.full(len(regions.area), -1)
    number[chosen] = np.arange(len(chosen))
    class_id, area, box = regions.class_id[chosen], regions.area[chosen], regions.box[chosen]
    if settings.per == "class" and len(chosen):
        class_id, member = np.unique(class_id, return_inverse=True)
        number[chosen] = member
        area = np.bincount(member, area).astype(np.int64)
        box = np.array([[*box[member == k, :2].min(0), *box[member == k, 2:].max(0)] for k in range(len(class_id))])
    index = number[regions.index]
    boxes = grown(box[:, [1, 0, 3, 2]].reshape(-1, 4), label.shape, settings.box_grow)
    points, labels = _points(index, box, boxes, settings.points)
    return Asked(index, class_id, area, box, Prompts(boxes, points, labels))


def grown(boxes: np.ndarray, size: tuple[int, int], share: float) -> np.ndarray:
    """Boxes [R, 4] (x0, y0, x1, y1) grown on all sides by a share of their own, 2 pixels at least, within the frame."""
    sides = np.maximum(share * (boxes[:, 2:] - boxes[:, :2]), 2)
    limit = np.array([size[1], size[0]])
    return np.concatenate([np.maximum(boxes[:, :2] - sides, 0), np.minimum(boxes[:, 2:] + sides, limit)], 1)


def _points(index: np.ndarray, tight: np.ndarray, boxes: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Points [R, P, 2] (x, y) and their labels [R, P]."""
    count = POINTS.index(kind)
    points, labels = np.zeros((len(tight), count, 2)), np.ones((len(tight), count), np.int64)
    for r, (top, left, bottom, right) in enumerate(tight):
        if count:
            points[r, 0] = np.array([left, top]) + innermost(index[top:bottom, left:right] == r)
        if count == 2:
            x0, y0, x1, y1 = boxes[r].astype(int)
            rest = index[y0 : y1 + 1, x0 : x1 + 1] != r
            points[r, 1] = np.array([x0, y0]) + innermost(rest) if rest.any() else points[r, 0]
            labels[r, 1] = 0 if rest.any() else 1
    return points, labels


def innermost(mask: np.ndarray) -> np.ndarray:
    """x, y of the pixel of a mask farthest from its outside; what lies beyond the array counts as outside."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))
    row, column = ndimage.maximum_position(depth)
    return np.array([column - 1, row - 1], dtype=np.float64)


# ---- what comes back


def pick(asked: Asked, masks: Masks, settings: BoundarySettings) -> tuple[Tensor, np.ndarray]:
    """The mask of each region with the largest ½ quality + ½ IoU with it, judged at low resolution: logits [R, h, w]
    and quality [R]."""
    grid = tuple(masks.logits.shape[-2:])
    chosen, quality = [], []
    for start in range(0, len(asked.area), settings.chunk):
        part = slice(start, start + settings.chunk)
        regions = np.stack([asked.mask(r) for r in range(start, min(start + settings.chunk, len(asked.area)))])
        inside = masks.frame.down(torch.from_numpy(regions), grid)[:, None]
        claimed = masks.logits[part] > 0
        iou = (inside & claimed).sum((2, 3)) / (inside | claimed).sum((2, 3)).clamp(min=1)
        best = (0.5 * masks.quality[part] + 0.5 * iou).argmax(1)
        rows = torch.arange(len(best))
        chosen.append(masks.logits[part][rows, best])
        quality.append(masks.quality[part][rows, best])
    return torch.cat(chosen), torch.cat(quality).numpy()


def upsampled(masks: Masks, logits: Tensor, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
    """(r, logits float [H, W]) of each region, `chunk` of them in memory at a time."""
    for start in range(0, len(logits), chunk):
        for offset, full in enumerate(masks.frame.up(logits[start : start + chunk]).numpy()):
            yield start + offset, full


def accepted(mask: np.ndarray, region: np.ndarray, quality: float, settings: BoundarySettings) -> tuple[bool, float]:
    """Whether a mask speaks for its region, and their IoU."""
    both, area = int(np.count_nonzero(mask & region)), int(np.count_nonzero(mask))
    own = int(np.count_nonzero(region))
    iou = both / max(area + own - both, 1)
    if settings.accept == "wsss":
        return both > 0.5 * area or both >= 0.85 * own, iou
    return quality >= settings.min_quality and iou >= settings.min_iou, iou


class _Votes:
    """The running maximum over accepted masks: who claims each pixel, and who denies it."""

    def __init__(self, label: np.ndarray, edge: np.ndarray, width: int) -> None:
        self.label, self.edge, self.width = label, edge, width
        self.score = np.zeros(label.shape, np.float32)
        self.area = np.full(label.shape, np.iinfo(np.int64).max)
        self.claim = np.full(label.shape, IGNORE, np.int64)
        self.denied = np.full(label.shape, -1, np.int64)  # -1: nobody; else the label that takes its place

    def add(self, r: int, asked: Asked, box: np.ndarray, logits: np.ndarray, quality: float, shrink: float) -> None:
        """Let the mask of region r vote inside its box and the band around it."""
        x0, y0, x1, y1 = box
        window = (slice(max(int(y0) - self.width, 0), int(np.ceil(y1)) + self.width),
                  slice(max(int(x0) - self.width, 0), int(np.ceil(x1)) + self.width))
        logits, own = logits[window], asked.index[window] == r
        self._claim(window, logits * quality, logits > 0, int(asked.area[r]), int(asked.class_id[r]))
        near = self.edge[window] & ndimage.binary_dilation(own, np.ones((3, 3), bool), self.width)
        replacement = 0 if (self.label[window][near] == 0).any() else IGNORE
        free = self.label[window] == IGNORE
        self.denied[window][near & (own | free) & (logits < -shrink)] = replacement

    def _claim(self, window, score: np.ndarray, claimed: np.ndarray, area: int, class_id: int) -> None:
        held, held_area, held_class = self.score[window], self.area[window], self.claim[window]
        smaller = (area < held_area) | ((area == held_area) & (class_id < held_class))
        wins = claimed & ((score > held) | ((score == held) & smaller))
        held[wins], held_area[wins], held_class[wins] = score[wins], area, class_id

    def result(self, editable: np.ndarray) -> np.ndarray:
        out = self.label.copy()
        claimed = editable & (self.claim != IGNORE)
        denied = editable & (self.claim == IGNORE) & (self.denied >= 0)
        out[claimed] = self.claim[claimed]
        out[denied] = self.denied[denied]
        return out


def sharpen(
    pictures: Sequence[np.ndarray], labels: Sequence[np.ndarray], segmenter: BoxSegmenter, settings: BoundarySettings,
) -> list[Sharpened]:
    """SABR for several pictures uint8 [H, W] or [H, W, 3] and their labels uint8 [H, W], which share one encoder call.

    A label without a region to ask, and one whose masks are all rejected, comes back as it is.
    """
    found = [find_regions(label) for label in labels]
    asked = [ask(*pair, settings) for pair in zip(labels, found, strict=True)]
    busy = [i for i, one in enumerate(asked) if len(one.area)]
    answers = segmenter.segment([pictures[i] for i in busy], [asked[i].prompts for i in busy],
                                3 if settings.multimask else 1) if busy else []
    done = {i: redraw(labels[i], found[i], asked[i], masks, settings) for i, masks in zip(busy, answers, strict=True)}
    return [done[i] if i in done else Sharpened(label, _table(asked[i], [], [], []), 0.0, _share(label == IGNORE))
            for i, label in enumerate(labels)]


def redraw(label: np.ndarray, regions: Regions, asked: Asked, masks: Masks, settings: BoundarySettings) -> Sharpened:
    """One label after the masks of its regions have voted."""
    width = band_width(label.shape, settings)
    edge = band(label, regions, width)
    editable = edge | (label == IGNORE)
    logits, quality = pick(asked, masks, settings)
    votes, verdicts, overlaps = _Votes(label, edge, width), [], []
    for r, full in upsampled(masks, logits, settings.chunk):
        good, iou = accepted(full > 0, asked.mask(r), float(quality[r]), settings)
        verdicts.append(good)
        overlaps.append(iou)
        if good:
            votes.add(r, asked, asked.prompts.boxes[r], full, float(quality[r]), settings.shrink)
    out = votes.result(editable)
    assert (out[~editable] == label[~editable]).all(), "a pixel outside the band changed"
    return Sharpened(out, _table(asked, quality, overlaps, verdicts), _share(out != label), _share(out == IGNORE))


def _share(mask: np.ndarray) -> float:
    return float(np.count_nonzero(mask) / mask.size)


def _table(asked: Asked, quality: Sequence[float], overlaps: Sequence[float], verdicts: Sequence[bool]) -> pd.DataFrame:
    rows = {"class_id": asked.class_id, "area": asked.area, "box": list(asked.prompts.boxes.tolist()),
            "quality": np.asarray(quality, float), "iou": np.asarray(overlaps, float),
            "accepted": np.asarray(verdicts, bool)}
    return pd.DataFrame(rows)
