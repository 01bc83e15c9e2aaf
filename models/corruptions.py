"""What goes wrong with an infrared picture, at five strengths: for the study `degradation` (GenFusion's open question).

Severity 0 is the picture itself, 5 the worst. STRENGTHS says what each severity means in physical terms: grey levels of
8 bit, pixels, shares of pixels, JPEG quality. The idea of graded corruptions is that of Hendrycks and Dietterich (ICLR
2019); the kinds and strengths here are ours, chosen with an uncooled thermal camera in mind.

Random kinds draw once per picture, whatever the severity: a stronger one adds to the same pattern, so that nothing but
the strength differs between two severities of a picture. Legend: H, W height and width in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from hashlib import blake2b

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from models.errors import UsageError

STRENGTHS = {
    "noise": (4.0, 8.0, 14.0, 22.0, 34.0),  # deviation of the noise of each pixel, grey levels; of columns: half
    "blur": (0.8, 1.3, 2.0, 3.0, 4.5),  # deviation of the Gaussian that is the optics, pixels
    "resolution": (1.5, 2.0, 3.0, 4.5, 7.0),  # pixels of the picture per pixel of the poorer sensor, along a side
    "jpeg": (50, 30, 18, 10, 5),  # quality of the JPEG that the picture went through
    "dead_pixels": (0.002, 0.006, 0.015, 0.04, 0.1),  # share of pixels that are stuck; of lines: a quarter of it
    "contrast": (0.7, 0.5, 0.33, 0.2, 0.1),  # share of the spread around the mean that is left
}
SEVERITIES = range(6)
LINE_SHARE = 0.25  # dead lines, relative to dead pixels: rarer, and worse


def picture_seed(seed: int, id: str) -> int:
    """63 bits that depend on the study's seed and the picture's id only: the same for any order of pictures."""
    return int.from_bytes(blake2b(f"{seed}|{id}".encode(), digest_size=8).digest(), "big") >> 1


def corrupt(picture: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """`picture` uint8 [H,W] with corruption `name` of CORRUPTIONS at severity 0..5; a new uint8 [H,W].

    seed: of `picture_seed`; equal arguments give equal pictures. Raises UsageError for a name, a severity or a picture
    that does not exist or fit.
    """
    if name not in CORRUPTIONS:
        raise UsageError(f"There is no corruption {name!r}; choose one of {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise UsageError(f"Severity is 0 (nothing) to 5 (worst), not {severity!r}.")
    if picture.ndim != 2 or picture.dtype != np.uint8:
        raise UsageError(f"Give a grey picture uint8 [H,W], not {picture.dtype} {list(picture.shape)}.")
    if severity == 0:
        return picture.copy()
    key = int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big")
    made = CORRUPTIONS[name](picture, STRENGTHS[name][int(severity) - 1], np.random.default_rng([seed, key]))
    return np.rint(made).clip(0, 255).astype(np.uint8)


def noise(picture: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Thermal noise of each pixel, and the fixed pattern of the columns' amplifiers at half its deviation."""
    pixels, columns = rng.standard_normal(picture.shape), rng.standard_normal((1, picture.shape[1]))
    return picture + deviation * (pixels + 0.5 * columns)


def blur(picture: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """A lens out of focus: a Gaussian, the border reflected."""
    return gaussian_filter(picture.astype(np.float32), deviation, mode="reflect")


def resolution(picture: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """A sensor of fewer pixels, each the mean of the area it covers, brought back to size by bilinear interpolation."""
    image = Image.fromarray(picture.astype(np.float32))
    width, height = (max(1, round(side / factor)) for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR))


def jpeg(picture: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    """There and back through a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.array(image)


def dead_pixels(picture: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Pixels, rows and columns that are stuck, each at black or at white; those of a lower severity stay stuck."""
    made = picture.copy()
    rank, stuck = rng.random(picture.shape), 255 * rng.integers(0, 2, picture.shape)
    for axis in (0, 1):
        shape = [1, 1]
        shape[axis] = picture.shape[axis]
        dead, value = rng.random(shape) < LINE_SHARE * share, 255 * rng.integers(0, 2, shape)
        made = np.where(dead, value, made)
    return np.where(rank < share, stuck, made)


def contrast(picture: np.ndarray, kept: float, rng: np.random.Generator) -> np.ndarray:
    """Objects as warm as what is around them: the spread around the mean shrinks, and 8 bit lose its fine levels."""
    mean = picture.mean()
    return mean + kept * (picture - mean)


CORRUPTIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "noise": noise,
    "blur": blur,
    "resolution": resolution,
    "jpeg": jpeg,
    "dead_pixels": dead_pixels,
    "contrast": contrast,
}
