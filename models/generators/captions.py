"""What a toy picture is captioned with: the names of what it shows, its light, and its tints.

Web captions tell colours and names, never outlines. So does this: names come with the picture, the rest is read off its
colours, and no mask is looked at.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.episode import number
from models.generators.grammar import caption
from models.generators.words import TINTS

DARK = 90  # mean grey level below which a picture is dark
STANDS_OUT = 0.06  # share of the pixels that a thing has at least
TOLD = 0.5  # how often a tint is told


@dataclass(frozen=True)
class Look:
    """How a picture looks, in words: its light, the tint of its ground, and that of what stands out from it."""

    dark: bool
    ground: str
    thing: str


def look_of(picture: np.ndarray) -> Look:
    """The look of a picture uint8 [H, W, 3]: ground is what most of it is like; what stands out are the pixels whose
    colour, whatever their light, is farthest from the ground's."""
    pixels = picture.reshape(-1, 3).astype(np.float32)
    colours = pixels / pixels.max(1, keepdims=True).clip(1)
    apart = np.abs(colours - np.median(colours, axis=0)).sum(1)
    out = pixels[apart >= np.quantile(apart, 1 - STANDS_OUT)]
    return Look(bool(picture.mean() < DARK), _tint(np.median(pixels, axis=0)), _tint(np.median(out, axis=0)))


def caption_of(names: Sequence[str], look: Look, *key: object) -> str:
    """A caption, decided by `key`: the names in some order, the light, and each half of the times the ground's tint
    and, of one thing alone, the thing's; never places."""
    rng = np.random.default_rng(number(*key))
    said = [names[n] for n in rng.permutation(len(names))]
    ground, thing = np.where(rng.random(2) < TOLD, (look.ground, look.thing), "").tolist()
    return caption(said, look.dark, ground, thing if len(said) == 1 else "")


def _tint(colour: np.ndarray) -> str:
    hue = colorsys.rgb_to_hsv(*colour)[0]
    return TINTS[round(hue * len(TINTS)) % len(TINTS)]
