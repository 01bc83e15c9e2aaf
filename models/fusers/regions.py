"""Regions of a picture without a network: what stays whole while a threshold moves.

In the place of Segment Anything where its weights are not at hand. The bright and the dark connected parts at evenly
spaced thresholds, each with the stability that SAM means: how much of it is left one threshold further in, against what
it has become one further out (Matas, Chum, Urban and Pajdla 2002 look for its maxima).

Legend: H W height and width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import label

STEP = 16  # grey levels between thresholds


def regions(grey: np.ndarray, area: tuple[float, float], stability: float, most: int) -> list[dict[str, Any]]:
    """uint8 [H,W] -> at most `most` regions, the most stable first, as SAM's generator gives its segments.

    area: smallest and largest share of the picture. stability: the least. Each region has segmentation (bool [H,W]),
    area (pixels), predicted_iou (1: nobody predicts one) and stability_score.
    """
    found = [part for bright in (grey, 255 - grey) for part in _parts(bright, area, stability)]
    return sorted(found, key=lambda part: -part["stability_score"])[:most]


def _parts(grey: np.ndarray, area: tuple[float, float], stability: float) -> list[dict[str, Any]]:
    """Connected parts at or above each threshold."""
    low, high = (share * grey.size for share in area)
    outer, outer_sizes, found = *_labelled(grey, STEP), []
    for level in range(2 * STEP, 256 - STEP, STEP):
        inner, sizes = _labelled(grey, level)
        left = np.bincount(inner.ravel(), grey.ravel() >= level + STEP, len(sizes))
        first = np.zeros(len(sizes), int)  # a pixel of each part
        first[inner.ravel()] = np.arange(inner.size)
        became = outer_sizes[outer.ravel()[first]]
        for part in np.flatnonzero((sizes >= low) & (sizes <= high)):
            score = left[part] / became[part]
            if part and score >= stability:
                found.append({"segmentation": inner == part, "area": int(sizes[part]), "predicted_iou": 1.0,
                              "stability_score": float(score)})  # fmt: skip
        outer, outer_sizes = inner, sizes
    return found


def _labelled(grey: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of the part that each pixel belongs to (0: below the level), and the size of each."""
    parts, _ = label(grey >= level)
    return parts, np.bincount(parts.ravel())
