"""The control without a generative model: histogram matching for lightness, a colour map for RGB.

What a fusion gains from these pictures it gains from a change of tone; only what SynDiff adds on top is synthesis.
Deterministic: the seeds are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from skimage.color import lab2rgb

from models.errors import UsageError
from models.generators.pictures import lightness_picture
from models.generators.settings import CHANNELS


class ThermalColour:
    """infrared -> lightness by matching each frame's histogram to that of the visible set's lightness;
    infrared -> RGB by a map from blue (cold) over violet to yellow (hot) whose lightness is the grey level.

    levels   256 ascending lightness values 0..255: quantiles of the visible set, evenly spaced in rank
    """

    def __init__(self, direction: str, levels: Sequence[float]):
        if direction not in CHANNELS:
            raise UsageError(f"There is no direction {direction!r}; choose one of {', '.join(CHANNELS)}.")
        self.direction, self.levels = direction, np.asarray(levels, dtype=float)

    @classmethod
    def fit(cls, direction: str, infrared: Iterable[np.ndarray], visible: Iterable[np.ndarray]) -> ThermalColour:
        """visible: uint8 [H,W,3] each. With none, a bell of lightness around mid-grey takes their place."""
        counts = np.zeros(256)
        for picture in visible:
            counts += np.bincount(lightness_picture(picture).ravel(), minlength=256)
        if not counts.any():
            counts = np.exp(-(((np.arange(256) - 115) / 55) ** 2) / 2)
        return cls(direction, np.interp(_ranks(np.ones(256)), _ranks(counts), np.arange(256)))

    def save(self, folder: Path) -> None:
        """Writes config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"direction": self.direction, "levels": self.levels.round(3).tolist()}
        (Path(folder) / "config.json").write_text(json.dumps(config))

    @classmethod
    def load(cls, folder: Path) -> ThermalColour:
        return cls(**json.loads((Path(folder) / "config.json").read_text()))

    def translate(self, images: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
        """uint8 [H,W] each -> uint8 [H,W] or [H,W,3] each."""
        return [self._matched(image) if self.direction == "lightness" else colour_map()[image] for image in images]

    def _matched(self, image: np.ndarray) -> np.ndarray:
        ranks = _ranks(np.bincount(image.ravel(), minlength=256).astype(float))
        table = np.interp(ranks, _ranks(np.ones(256)), self.levels)
        return np.rint(table).clip(0, 255).astype(np.uint8)[image]


def _ranks(counts: np.ndarray) -> np.ndarray:
    """The middle rank, in (0,1), of each level of a histogram."""
    return (np.cumsum(counts) - counts / 2) / counts.sum()


def colour_map() -> np.ndarray:
    """uint8 [256,3]: lightness rises evenly from 5 to 95 while the hue turns from blue over violet to yellow."""
    share = np.linspace(0, 1, 256)
    hue = np.radians(280 + 170 * share)
    chroma = 55 * np.sin(np.pi * (0.1 + 0.8 * share))
    lab = np.stack([5 + 90 * share, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    return np.rint(lab2rgb(lab[None])[0] * 255).astype(np.uint8)
