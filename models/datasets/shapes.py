"""Twelve outlines and what their surface does to heat: the vocabulary of the toy dataset.

A shape lives on the square [-1, 1]². `distance(u, v)` is negative inside and about one per unit; `texture(u, v)` is the
heat pattern, about -1..1. Both work on float arrays of any one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """One class: its outline, surface, size (radius per short side), heat (-1..1), colour (hue 0..1)."""

    name: str
    distance: Field
    texture: Field
    radius: float
    heat: float
    hue: float


# ---- outlines


def box(u, v, half_width, half_height, centre=(0.0, 0.0)):
    return np.maximum(np.abs(u - centre[0]) - half_width, np.abs(v - centre[1]) - half_height)


def disc(u, v):
    return np.hypot(u, v) - 0.85


def ring(u, v):
    return np.abs(np.hypot(u, v) - 0.7) - 0.25


def square(u, v):
    return box(u, v, 0.75, 0.75)


def bar(u, v):
    return box(u, v, 1.0, 0.33)


def triangle(u, v):
    return np.maximum(v - 0.7, 0.87 * np.abs(u) - 0.5 * v - 0.5)


def cross(u, v):
    return np.minimum(box(u, v, 0.95, 0.3), box(u, v, 0.3, 0.95))


def star(u, v):
    angle = np.arctan2(u, v)
    wedge = np.abs(np.mod(angle * 5 / (2 * np.pi), 1.0) - 0.5) * 2
    return np.hypot(u, v) - (0.42 + 0.6 * wedge**1.5)


def crescent(u, v):
    return np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v))


def corner(u, v):
    return np.minimum(box(u, v, 0.3, 0.9, (-0.6, 0.0)), box(u, v, 0.9, 0.3, (0.0, 0.6)))


def arch(u, v):
    legs = box(np.abs(u), v, 0.2, 0.5, (0.7, 0.45))
    return np.minimum(np.maximum(np.abs(np.hypot(u, v) - 0.7) - 0.2, v), legs)


def dumbbell(u, v):
    return np.minimum(np.hypot(np.abs(u) - 0.65, v) - 0.38, box(u, v, 0.6, 0.16))


def comb(u, v):
    teeth = box(np.abs(np.abs(u) - 0.4), v, 0.14, 0.55, (0.4, 0.3))
    middle = box(u, v, 0.14, 0.55, (0.0, 0.3))
    return np.minimum(np.minimum(teeth, middle), box(u, v, 0.94, 0.22, (0.0, -0.45)))


# ---- surfaces


def warm_core(u, v):
    return 1.2 - 2.2 * np.hypot(u, v)


def warm_rim(u, v):
    return 2.4 * np.hypot(u, v) - 1.4


def even(u, v):
    return np.full_like(u, 0.2)


def checks(u, v):
    return np.sign(np.sin(6.5 * u) * np.sin(6.5 * v)) * 0.8


def stripes(u, v):
    return np.sign(np.sin(9.0 * u)) * 0.8


def slope(u, v):
    return 1.2 * v


def spots(u, v):
    return np.where(np.cos(8.0 * u) + np.cos(8.0 * v) > 0.7, 1.0, -0.5)


def halves(u, v):
    return np.where(u < 0, 0.9, -0.7)


def waves(u, v):
    return 0.9 * np.sin(8.0 * (u + v))


SHAPES = (
    Shape("disc", disc, warm_core, 0.175, 0.75, 0.02),
    Shape("ring", ring, even, 0.20, 0.60, 0.55),
    Shape("square", square, checks, 0.18, 0.60, 0.30),
    Shape("bar", bar, stripes, 0.24, 0.60, 0.12),
    Shape("triangle", triangle, slope, 0.21, 0.50, 0.80),
    Shape("cross", cross, warm_core, 0.21, 0.65, 0.65),
    Shape("star", star, warm_rim, 0.22, 0.60, 0.15),
    Shape("crescent", crescent, waves, 0.21, 0.55, 0.45),
    Shape("corner", corner, slope, 0.21, 0.50, 0.95),
    Shape("arch", arch, even, 0.22, 0.70, 0.72),
    Shape("dumbbell", dumbbell, halves, 0.25, 0.60, 0.38),
    Shape("comb", comb, spots, 0.22, 0.65, 0.05),
)
