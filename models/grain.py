"""Sensor noise: how much of it real pictures have, and as much for pictures that have none.

A generator draws clean pictures. A segmenter that learns novel classes from clean pictures and everything else from
noisy frames learns that clean means novel. Nothing of this is in Syn4Seg (arXiv 2603.27206), whose frames and pictures
are photographs of one kind.

The noise of a picture is estimated as Immerkær does ("Fast noise variance estimation", CVIU 1996), with the median in
place of the mean, so that edges and objects count little.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import torch
from torch.nn.functional import conv2d, interpolate

LAPLACIANS = [[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]  # blind to planes; of white noise it makes 6 σ
NORMAL = 0.6745  # the median of |x| of a standard normal


def noise_level(picture: np.ndarray) -> float:
    """σ, in grey levels, of the white noise in a picture uint8 [H, W] or [H, W, 3] of at least 3 x 3 pixels."""
    planes = torch.from_numpy(np.atleast_3d(picture).astype(np.float32)).permute(2, 0, 1)[:, None]
    seen = conv2d(planes, torch.tensor(LAPLACIANS)[None, None])
    return float(seen.abs().median()) / (6 * NORMAL)


class Grain:
    """The noise of some real pictures of one size, ready to be given to others.

    levels: σ of each, in grey levels. size: [H, W] of the first.
    """

    def __init__(self, pictures: Iterable[np.ndarray]) -> None:
        self.levels, self.size = [], None
        for picture in pictures:
            self.size = self.size or picture.shape[:2]
            self.levels.append(noise_level(picture))

    def add(self, picture: np.ndarray, key: str) -> np.ndarray:
        """`picture` uint8 at the scale of the real ones, with the noise that one of them has.

        It is resized to fit within their size, sides in proportion, as noise is grainier in a smaller picture that is
        enlarged later. Which of them it takes after, and the noise, depend on the levels and on `key` alone; what noise
        it has already is counted.
        """
        if not self.levels:
            return picture
        rng = np.random.default_rng(list(blake2b(key.encode(), digest_size=16).digest()))
        fitted = _fitted(picture, self.size)
        missing = self.levels[rng.integers(len(self.levels))] ** 2 - noise_level(fitted) ** 2
        noisy = fitted + rng.normal(0.0, max(missing, 0.0) ** 0.5, fitted.shape)
        return noisy.round().clip(0, 255).astype(np.uint8)


def _fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32, as large as fits within `size`; means over areas where it shrinks."""
    factor = min(size[0] / picture.shape[0], size[1] / picture.shape[1])
    target = tuple(max(3, round(side * factor)) for side in picture.shape[:2])
    planes = torch.from_numpy(np.atleast_3d(picture).astype(np.float32)).permute(2, 0, 1)[None]
    if target != picture.shape[:2]:
        planes = interpolate(planes, target, mode="bilinear", align_corners=False, antialias=True)
    return planes[0].permute(1, 2, 0).numpy().reshape(*target, *picture.shape[2:])
