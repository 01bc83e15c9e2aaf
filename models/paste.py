"""Things of labelled synthetic pictures, pasted on real frames: a novel object among base ones, on the camera's ground.

A generator draws one thing on plain ground. A segmenter that meets novel classes only there learns that crowded frames
hold none. Pasting is Ghiasi et al., "Simple Copy-Paste" (arXiv 2012.07177), with drawn instances as in X-Paste
(arXiv 2212.03863). It is no part of Syn4Seg (arXiv 2603.27206).

Legend: H x W pixels of a frame, h x w of a picture.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch.nn.functional import conv2d, interpolate

from models.episode import number
from models.pseudolabels import IGNORE

SCALES = (0.6, 1.0)  # of a picture that fits the frame, side by side
LIGHTS = (1 / 3, 3.0)  # how far a thing may be dimmed or lit to suit the frame
LAPLACIANS = [[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]  # blind to planes; of white noise it makes 6 σ
NORMAL = 0.6745  # the median of |x| of a standard normal
NEAR = 1 / 12  # of the frame's shorter side: around a thing, ground is known to be ground


def paste(
    frame: np.ndarray, known: np.ndarray, picture: np.ndarray, mask: np.ndarray, k: int, key: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The frame uint8 [H, W] or [H, W, 3] with the thing under `mask` bool [h, w] of `picture` uint8 [h, w] or
    [h, w, 3] somewhere in it (on a grey frame, its light), and its label uint8 [H, W]: k where the thing is, `known`
    (base classes, 0 background) elsewhere.

    Base frames hide novel objects as background, and there a pasted one of the same class would lie beside them: only
    near the thing background stays, else it becomes 255. Size and place depend on `key` alone. In colour, the thing is
    lit as the frame is, by the ratio of the median lights of the grounds; it gets the frame's noise. An empty mask
    gives the frame as it is.
    """
    rng = np.random.default_rng(number("paste", key))
    label, canvas = known.copy(), np.atleast_3d(frame).astype(np.float32)
    scale = rng.uniform(*SCALES) * min(np.divide(frame.shape[:2], mask.shape))
    thing, cover = _resized(picture, scale), _resized(mask, scale)[..., 0]
    rows, columns = (np.flatnonzero((cover > 0.5).any(axis)) for axis in (1, 0))
    if not len(rows):
        return frame, label
    missing = max(noise_level(frame) ** 2 - noise_level(picture) ** 2, 0) ** 0.5
    thing = thing * _light(frame, picture, mask) + rng.normal(0, missing, thing.shape)
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    thing, cover = thing[box] if frame.ndim == 3 else thing[box].mean(-1, keepdims=True), cover[box]
    corner = [rng.integers(room + 1) for room in np.subtract(frame.shape[:2], cover.shape)]
    window = tuple(slice(start, start + side) for start, side in zip(corner, cover.shape, strict=True))
    canvas[window] += cover[..., None] * (thing - canvas[window])
    there = np.zeros(label.shape, bool)
    there[window] = cover > 0.5
    far = distance_transform_edt(~there) > NEAR * min(label.shape)
    label[far & (label == 0)] = IGNORE
    label[there] = k
    return canvas.round().clip(0, 255).astype(np.uint8).reshape(frame.shape), label


def noise_level(picture: np.ndarray) -> float:
    """σ, in grey levels, of the white noise in a picture uint8 [H, W] or [H, W, 3] of at least 3 x 3 pixels: as
    Immerkær ("Fast noise variance estimation", CVIU 1996), with the median in place of the mean, so that edges and
    objects count little."""
    planes = torch.from_numpy(np.atleast_3d(picture).astype(np.float32)).permute(2, 0, 1)[:, None]
    seen = conv2d(planes, torch.tensor(LAPLACIANS)[None, None])
    return float(seen.abs().median()) / (6 * NORMAL)


def _light(frame: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> float:
    """How much brighter the frame is than the ground of the picture; 1 without colour, where levels are no light."""
    if frame.ndim == 2 or mask.all():
        return 1.0
    ground = float(np.median(np.atleast_3d(picture)[~mask].mean(-1)))
    return float(np.clip(np.median(frame.mean(-1)) / max(ground, 1.0), *LIGHTS))


def _resized(picture: np.ndarray, factor: float) -> np.ndarray:
    """float32 [h', w', C], sides times the factor, 1 pixel at least."""
    size = [max(1, int(side * factor)) for side in picture.shape[:2]]
    planes = torch.from_numpy(np.atleast_3d(picture).astype(np.float32)).permute(2, 0, 1)[None]
    made = interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
    return made[0].permute(1, 2, 0).numpy()
