"""The eleven measures once more, as toolkits write them: numpy and scipy, one image, one pair of pictures at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import correlate
from scipy.signal import convolve2d


def entropy(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    return _entropy(np.histogram(f, 256, (0, 256))[0])


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def mutual_information(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    total = 0.0
    for x in (a, b):
        joint = np.histogram2d(x.ravel(), f.ravel(), 256, [[0, 256], [0, 256]])[0]
        total += _entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint)
    return total


def spatial_frequency(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    return float(np.sqrt((np.diff(f, axis=0) ** 2).mean() + (np.diff(f, axis=1) ** 2).mean()))


def average_gradient(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    gy, gx = np.gradient(f)
    return float(np.sqrt((gx**2 + gy**2) / 2).mean())


def _r(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def scd(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    return _r(f - b, a) + _r(f - a, b)


def cc(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    return (_r(a, f) + _r(b, f)) / 2


def psnr(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    error = (((a - f) ** 2).mean() + ((b - f) ** 2).mean()) / 2
    return float(10 * np.log10(255**2 / error))


def window(size: int, sigma: float) -> np.ndarray:
    x = np.arange(size) - size // 2
    one = np.exp(-(x**2) / (2 * sigma**2))
    return np.outer(one, one) / one.sum() ** 2


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    w = window(11, 1.5)

    def mean(z):
        return convolve2d(z, w, "valid")

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def ssim(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    return _ssim(a, f) + _ssim(b, f)


def _vif(reference: np.ndarray, f: np.ndarray) -> float:
    above, below = 0.0, 0.0
    for scale in range(4):
        size = 2 ** (4 - scale) + 1
        w = window(size, size / 5)
        if scale:
            reference, f = (convolve2d(z, w, "valid")[::2, ::2] for z in (reference, f))
        m1, m2 = convolve2d(reference, w, "valid"), convolve2d(f, w, "valid")
        v1 = np.maximum(convolve2d(reference**2, w, "valid") - m1**2, 0)
        v2 = np.maximum(convolve2d(f**2, w, "valid") - m2**2, 0)
        v12 = convolve2d(reference * f, w, "valid") - m1 * m2
        g = v12 / (v1 + 1e-10)
        rest = v2 - g * v12
        g[v1 < 1e-10], rest[v1 < 1e-10] = 0, v2[v1 < 1e-10]
        v1[v1 < 1e-10] = 0
        g[v2 < 1e-10], rest[v2 < 1e-10] = 0, 0
        rest[g < 0] = v2[g < 0]
        g[g < 0] = 0
        above += np.log10(1 + g**2 * v1 / (np.maximum(rest, 1e-10) + 2)).sum()
        below += np.log10(1 + v1 / 2).sum()
    return above / below


def vif(a: np.ndarray, b: np.ndarray, f: np.ndarray) -> float:
    return _vif(a, f) + _vif(b, f)


def _edges(x: np.ndarray, interior: bool) -> tuple[np.ndarray, np.ndarray]:
    across = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gx, gy = (correlate(x, k, mode="constant") for k in (across, across.T))
    if interior:
        gx, gy = gx[1:-1, 1:-1], gy[1:-1, 1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.arctan(gy / gx)
    angle[gx == 0] = np.pi / 2
    return np.sqrt(gx**2 + gy**2), angle


def qabf(a: np.ndarray, b: np.ndarray, f: np.ndarray, interior: bool = False) -> float:
    gf, af = _edges(f, interior)
    above, below = 0.0, 0.0
    for x in (a, b):
        g, angle = _edges(x, interior)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(g > gf, gf / g, np.where(g < gf, g / gf, 1.0))
        turn = 1 - np.abs(angle - af) / (np.pi / 2)
        q = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (turn - 0.8)))
        above, below = above + (q * g).sum(), below + g.sum()
    return above / below


REFERENCE: dict[str, Callable[..., float]] = {
    "EN": entropy, "SD": lambda a, b, f: float(f.std()), "SF": spatial_frequency, "AG": average_gradient,
    "MI": mutual_information, "SCD": scd, "CC": cc, "PSNR": psnr, "SSIM": ssim, "VIF": vif, "Qabf": qabf,
}  # fmt: skip
