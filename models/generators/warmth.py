"""The infrared route without a generative model: how warm each class is, under the picture's own light and shade.

Syn4Seg spec §7, route C: an infrared picture of a labelled visible one, by a table of the grey level of each class. The
table is read of real infrared frames: base classes of the training frames, novel ones of their supports. Pixel-aligned
by construction, so that the label carries over; what it teaches is the outline, and the mean tone.

Legend: H x W pixels, K classes; class ids 0 (background)..K, 255 unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from models.generators.pictures import lightness_picture

UNKNOWN = 255


@dataclass(frozen=True)
class Warmth:
    """tone, spread: float [K + 1], mean grey level of a class and the deviation within an object of it; those of the
    background where a class was never seen. blur: of the optics, in pixels. noise: of the sensor, in grey levels."""

    tone: np.ndarray
    spread: np.ndarray
    blur: float = 0.8
    noise: float = 2.0

    @classmethod
    def fit(cls, examples: Iterable[tuple[np.ndarray, np.ndarray]], classes: int, **changes: float) -> Warmth:
        """examples: (infrared uint8 [H, W], label uint8 [H, W]), of which pixels labelled 255 count nowhere."""
        pixels, tones, within = np.zeros((3, classes + 1))
        for infrared, label in examples:
            for k in set(np.unique(label).tolist()) - {UNKNOWN}:
                grey = infrared[label == k].astype(float)
                pixels[k], tones[k] = pixels[k] + grey.size, tones[k] + grey.sum()
                within[k] += ((grey - grey.mean()) ** 2).sum()
        seen = pixels > 0
        tone = np.where(seen, tones / np.maximum(pixels, 1), tones[0] / max(pixels[0], 1))
        spread = np.sqrt(np.where(seen, within / np.maximum(pixels, 1), within[0] / max(pixels[0], 1)))
        return cls(tone, spread, **changes)

    def translate(self, picture: np.ndarray, label: np.ndarray, seed: int) -> np.ndarray:
        """uint8 [H, W] of a visible picture uint8 [H, W, 3] and its label; a function of both and the seed alone."""
        known = np.where(label == UNKNOWN, 0, label)
        light = lightness_picture(picture).astype(float)
        warm = np.zeros(label.shape)
        for k in np.unique(known):
            here = known == k
            deviation = light[here].std()
            detail = (light[here] - light[here].mean()) / deviation if deviation > 0 else 0.0
            warm[here] = self.tone[k] + self.spread[k] * detail
        rng = np.random.default_rng(seed)
        seen = gaussian_filter(warm, self.blur) + rng.normal(0, self.noise, label.shape)
        return np.rint(seen.clip(0, 255)).astype(np.uint8)
