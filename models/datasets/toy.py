"""Toy: paired thermal and visible scenes that are drawn on demand, with exact masks.

Hard on purpose: heat alone does not tell the classes apart (its sign, gain and ambient vary from scene to scene and
from object to object); warm things of no class, gradients, occluders, optical blur, sensor noise and the camera's
fixed pattern get in the way. Outline and surface do tell them apart. The visible picture shares the geometry, with its
own colours, light and shadows.

Legend: H, W height and width in pixels; temperatures are in arbitrary degrees, about 20 grey levels each at gain 1.
"""

from __future__ import annotations

import colorsys
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from models.datasets.base import Item, Picture, colours, make_folds
from models.datasets.shapes import SHAPES, Shape
from models.errors import UsageError


class Toy:
    """Scenes of 2..5 objects of 12 classes. A scene depends on (seed, split, index) alone.

    size: (H, W). train, test, unlabelled, visible: scenes of each split. objects: (fewest, most) per scene.
    noise: 1 is the default difficulty of the sensor, 0 a perfect one. ground: likewise of the pattern on the ground.
    clutter: whether warm things of no class and poles are in the way. scale: of the objects. spread: how far from the
    middle they lie, 1 being all over the frame. folds: "contiguous" or "interleaved".
    """

    name = "toy"
    homepage = ""
    citation = "Drawn by thermofuse itself."
    classes = tuple(shape.name for shape in SHAPES)
    palette = colours(len(SHAPES))
    ignored: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        size: tuple[int, int] = (96, 128),
        train: int = 160,
        test: int = 80,
        unlabelled: int = 0,
        visible: int = 0,
        seed: int = 0,
        objects: tuple[int, int] = (2, 5),
        noise: float = 1.0,
        ground: float = 1.0,
        clutter: bool = True,
        scale: float = 1.0,
        spread: float = 1.0,
        folds: str = "contiguous",
    ) -> None:
        if min(size) < 32:
            raise UsageError(f"Toy scenes need 32 pixels or more on each side, not {size[0]}x{size[1]}.")
        if not 1 <= objects[0] <= objects[1] <= len(SHAPES):
            raise UsageError(f"Toy scenes hold 1..{len(SHAPES)} objects (fewest, most), not {tuple(objects)}.")
        self.size, self.seed, self.objects, self.noise = tuple(size), seed, tuple(objects), noise
        self.ground, self.clutter, self.scale, self.spread = ground, clutter, scale, spread
        self.counts = {"train": train, "test": test, "unlabelled": unlabelled, "visible": visible}
        self.folds = make_folds(self.classes, 4, folds)

    def items(self) -> list[Item]:
        return [self._item(split, index) for split, count in self.counts.items() for index in range(count)]

    def _item(self, split: str, index: int) -> Item:
        name = f"{split}-{index:05d}"
        layers = {"unlabelled": ("infrared",), "visible": ("visible",)}.get(split, ("infrared", "visible", "label"))
        return Item(name, split, **{layer: f"{split}/{index}" for layer in layers})

    def read(self, item: Item) -> Picture:
        """Draws the scene."""
        key = f"{self.seed}|{item.id}".encode()
        rng = np.random.default_rng(int.from_bytes(blake2b(key, digest_size=8).digest(), "big"))
        scene = Scene(rng, self.size, self.ground, self.scale, self.spread)
        for shape in self._cast(rng):
            scene.put(shape)
        if self.clutter:
            scene.occlude()
        return Picture(
            infrared=scene.infrared(self._pattern(), self.noise) if item.infrared else None,
            visible=scene.visible(self.noise) if item.visible else None,
            label=scene.label if item.label else None,
        )

    def _cast(self, rng: np.random.Generator) -> list[Shape | None]:
        """Who is in the scene, from back to front; None is a warm thing of no class."""
        count = rng.integers(self.objects[0], self.objects[1] + 1)
        cast: list[Shape | None] = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:count]]
        for _ in range(rng.integers(0, 3) if self.clutter else 0):
            cast.insert(rng.integers(len(cast) + 1), None)
        return cast

    def _pattern(self) -> np.ndarray:
        """The fixed pattern of the one camera: offsets of columns and pixels, float [H,W], grey levels."""
        rng = np.random.default_rng(self.seed)
        return rng.normal(0, 2.0, (1, self.size[1])) + rng.normal(0, 1.5, self.size)


@cache
def _stretch(cells: int, length: int) -> np.ndarray:
    """The matrix [length, cells] of linear interpolation from a coarse grid."""
    places = np.linspace(0, cells - 1, length)
    return np.stack([np.interp(places, np.arange(cells), row) for row in np.eye(cells)], axis=1)


class Scene:
    """A scene being drawn: heat float [H,W], albedo float [H,W,3] 0..1, label uint8 [H,W]."""

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, int], pattern: float = 1.0, scale: float = 1.0,
        spread: float = 1.0,
    ) -> None:
        self.rng, self.size, self.scale, self.spread = rng, size, scale, spread
        self.centres: list[np.ndarray] = []
        self.polarity = rng.choice((1.0, -1.0), p=(0.7, 0.3))
        slope = np.linspace(-1, 1, size[0])[:, None] * rng.normal(0, 0.5)
        self.ground = self._clouds(4, 0.5 * pattern) + self._clouds(10, 0.25 * pattern) + slope
        self.heat = self.ground.copy()
        soil = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.4), rng.uniform(0.3, 0.7)))
        self.albedo = soil + self._clouds(8, 0.12 * pattern)[..., None] + self._clouds(24, 0.05 * pattern)[..., None]
        self.shadow = np.zeros(size)
        self.label = np.zeros(size, dtype=np.uint8)

    def _clouds(self, cells: int, amount: float) -> np.ndarray:
        """Smooth noise with about `cells` bumps across, standard deviation about `amount`, float [H,W]."""
        coarse = self.rng.normal(0, amount, (cells, cells))
        down, across = (_stretch(cells, length) for length in self.size)
        return down @ coarse @ across.T

    def put(self, shape: Shape | None) -> None:
        """Draws one object in front of what is there; None draws a blob of random outline."""
        rng, (height, width) = self.rng, self.size
        size = self.scale * (shape.radius if shape else rng.uniform(0.08, 0.2))
        radius = min(self.size) * size * rng.uniform(0.85, 1.2)
        row, column = self._place()
        reach = int(radius * 1.6) + 2
        rows = slice(max(int(row) - reach, 0), min(int(row) + reach, height))
        columns = slice(max(int(column) - reach, 0), min(int(column) + reach, width))
        u, v = self._local(rows, columns, (row, column), radius)
        distance, texture = (shape.distance(u, v), shape.texture(u, v)) if shape else self._blob(u, v)
        self._paint((rows, columns), np.clip(0.5 - distance * radius / 1.5, 0, 1), texture, shape)

    def _place(self) -> tuple[float, float]:
        """A centre: of three drawn ones, that farthest from what is there, so that overlap is common but not total."""
        reach = 0.38 * self.spread
        drawn = self.rng.uniform(0.5 - reach, 0.5 + reach, (3, 2)) * self.size
        gaps = [min((np.hypot(*(spot - other)) for other in self.centres), default=0) for spot in drawn]
        self.centres.append(drawn[int(np.argmax(gaps))])
        return tuple(self.centres[-1])

    def _local(self, rows: slice, columns: slice, centre: tuple[float, float], radius: float):
        """Coordinates of the pixels in the frame of a turned, slightly squeezed object."""
        y, x = np.mgrid[rows, columns].astype(np.float64)
        y, x = (y - centre[0]) / radius, (x - centre[1]) / radius
        angle, squeeze = self.rng.normal(0, 0.35), self.rng.uniform(0.85, 1.18)
        cos, sin = np.cos(angle), np.sin(angle)
        return (cos * x + sin * y) * squeeze, (cos * y - sin * x) / squeeze

    def _blob(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng, angle = self.rng, np.arctan2(v, u)
        wobble = sum(rng.normal(0, 0.12) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (1, 2, 3))
        return np.hypot(u, v) - (0.8 + wobble), rng.normal(0, 0.8) * u + rng.normal(0, 0.8) * v

    def _paint(self, window: tuple[slice, slice], cover: np.ndarray, texture: np.ndarray, shape: Shape | None) -> None:
        rng = self.rng
        sign = rng.choice((1.0, -1.0), p=(0.9, 0.1))
        excess = (shape.heat if shape else 0.6) * rng.uniform(2.2, 4.5) * (1 + rng.uniform(0.4, 0.65) * texture)
        softness = cover if shape or rng.uniform() < 0.6 else gaussian_filter(cover, 3.0)
        self.heat[window] += softness * (sign * excess + 0.6 * self.ground[window] - self.heat[window])
        hue = (shape.hue if shape else rng.uniform()) + rng.normal(0, 0.1)
        colour = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.35, 0.9), rng.uniform(0.4, 0.95)))
        painted = colour * (1 + 0.18 * texture[..., None])
        self.albedo[window] += cover[..., None] * (painted - self.albedo[window])
        cast = np.zeros_like(cover)
        cast[2:, 3:] = cover[:-2, :-3]
        self.shadow[window] = np.maximum(self.shadow[window], cast * (1 - cover))
        self.label[window][cover > 0.5] = (SHAPES.index(shape) + 1) if shape else 0

    def occlude(self) -> None:
        """Now and then a pole or a beam in front of everything, at the temperature of the air."""
        for _ in range(self.rng.integers(0, 2)):
            thickness = int(self.rng.integers(2, 2 + max(min(self.size) // 24, 2)))
            axis = int(self.rng.integers(2))
            start = int(self.rng.integers(0, self.size[axis] - thickness))
            window = (slice(None), slice(start, start + thickness))[:: 1 if axis else -1]
            self.heat[window] = self.rng.normal(0, 0.6)
            self.albedo[window] = self.rng.uniform(0.1, 0.6)
            self.label[window] = 0

    def infrared(self, pattern: np.ndarray, noise: float) -> np.ndarray:
        """What the thermal camera gives, uint8 [H,W]: blurred, with gain, ambient, polarity, noise and pattern."""
        rng = self.rng
        seen = gaussian_filter(self.heat, 0.6) * self.polarity * rng.uniform(14, 24) + rng.uniform(80, 150)
        seen += noise * (pattern + rng.normal(0, rng.uniform(1.5, 4.5), self.size))
        return np.clip(np.round(seen), 0, 255).astype(np.uint8)

    def visible(self, noise: float) -> np.ndarray:
        """What the colour camera gives, uint8 [H,W,3]: lit from one side, shadowed, at night dark and noisy."""
        rng, night = self.rng, self.rng.uniform() < 0.3
        light = np.linspace(*rng.uniform(0.6, 1.2, 2), self.size[1])[None, :] * (1 - 0.5 * self.shadow)
        tint = rng.uniform(0.85, 1.1, 3) * (0.35 if night else 1.0)
        seen = 255 * self.albedo * light[..., None] * tint
        seen += noise * rng.normal(0, 9.0 if night else 4.0, seen.shape)
        return np.clip(np.round(seen), 0, 255).astype(np.uint8)
