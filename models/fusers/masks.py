"""One soft mask per picture of a pair: what stands out in infrared, what is finely drawn in the visible.

SGDFuse (arXiv 2508.05264) takes masks from Segment Anything (Kirillov et al. 2023) and does not say how the many
segments of one picture become one channel. Here a segment counts by its quality times how hot it is against the ring
around it (infrared), or how strong its edges are against the picture's (visible); too large and too small ones do not.
The union of all segments would be the whole picture.

Where masks come from: "sam" runs the network, once per picture, and keeps the result in a folder; "levels" asks
`regions.py` for segments in its place, which needs no weights; "file" reads `sam_ir/<name>.png` and
`sam_vis/<name>.png`; "none" gives empty masks, with which every loss and sampler goes on.

Legend: H W height and width, S segments; masks are uint8 [H,W], 0..255 for 0..1, or tensors [B,1,H,W] in 0..1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum_filter, sobel
from torch import Tensor
from torch.nn import functional as F

from models.errors import UsageError
from models.frames import png_bytes, read_png
from models.fusers.regions import regions
from models.fusers.settings import MaskSettings

BACKENDS = ("none", "file", "levels", "sam")
MODES = ("soft", "binary", "union")
DROPS = ("", "infrared", "visible", "both")
RING = 15  # pixels around a segment that it has to be hotter than


class MaskProvider:
    """Masks of pairs. cache: a folder for what "sam" found; network: a Sam module in place of the checkpoint's."""

    def __init__(self, settings: MaskSettings, cache: Path | None = None, network: Any = None) -> None:
        for name, known in (("backend", BACKENDS), ("mode", MODES), ("drop", DROPS)):
            if getattr(settings, name) not in known:
                wrong = getattr(settings, name)
                raise UsageError(f"There is no mask {name} {wrong!r}; choose one of {', '.join(filter(None, known))}.")
        if settings.backend == "file" and not (settings.folder and Path(settings.folder).is_dir()):
            raise UsageError(f"There is no folder {settings.folder} of masks; make it, with sam_ir/ and sam_vis/.")
        if settings.backend == "sam" and network is None and not Path(settings.checkpoint or "").is_file():
            raise UsageError(f"There is no checkpoint {settings.checkpoint}; give a weights file of {settings.model}.")
        self.settings, self.cache, self._network = settings, cache and Path(cache), network

    def masks(self, infrared: np.ndarray, visible: np.ndarray, name: str = "") -> tuple[np.ndarray, np.ndarray]:
        """uint8 [H,W] and [H,W,3] -> a mask uint8 [H,W] of each. `name`: the stem that "file" looks for."""
        found = self._found(infrared, visible, name)
        return tuple(self._changed(kind, mask) for kind, mask in zip(("infrared", "visible"), found, strict=True))

    def aux(self, infrared: np.ndarray, visible: np.ndarray, name: str = "") -> dict[str, np.ndarray]:
        """The masks as `Fuser.pictures` takes them beside a pair; nothing where there are none."""
        if self.settings.backend == "none":
            return {}
        return dict(zip(("mask_infrared", "mask_visible"), self.masks(infrared, visible, name), strict=True))

    def _changed(self, kind: str, mask: np.ndarray) -> np.ndarray:
        """Emptied, grown or shrunk, as the settings want it."""
        if self.settings.drop in (kind, "both"):
            return np.zeros_like(mask)
        grown = morph(torch.from_numpy(mask)[None, None].float(), self.settings.grow)
        return grown[0, 0].byte().numpy()

    def _found(self, infrared: np.ndarray, visible: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        if self.settings.backend == "none":
            return (np.zeros(infrared.shape[:2], np.uint8),) * 2
        if self.settings.backend == "file":
            folder = Path(self.settings.folder)
            return tuple(_read(folder / part / f"{name}.png", infrared.shape[:2]) for part in ("sam_ir", "sam_vis"))
        return tuple(self._kept(kind, picture) for kind, picture in (("infrared", infrared), ("visible", visible)))

    def _kept(self, kind: str, picture: np.ndarray) -> np.ndarray:
        """The mask of one picture, from the cache where it is."""
        facts = {"kind": kind, "weights": self._weights, **asdict(replace(self.settings, grow=0, drop=""))}
        text = json.dumps(facts, sort_keys=True)
        digest = hashlib.blake2b(text.encode() + np.ascontiguousarray(picture).tobytes(), digest_size=12).hexdigest()
        path = self.cache / f"{digest}.png" if self.cache else None
        if path and path.is_file():
            return read_png(path)
        mask = merge(self._segments(kind, picture), kind, picture, self.settings)
        if path:
            self.cache.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".json").write_text(text)
            part = path.with_suffix(f".{os.getpid()}")  # another worker may draw the same one
            part.write_bytes(png_bytes(mask))
            part.rename(path)
        return mask

    @cached_property
    def _weights(self) -> str:
        """What tells one set of weights from another."""
        if self.settings.checkpoint is None:
            return "given"
        with open(self.settings.checkpoint, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def _segments(self, kind: str, picture: np.ndarray) -> list[dict]:
        if self.settings.backend == "levels":
            grey = picture if kind == "infrared" else picture.mean(-1).round().astype(np.uint8)
            return regions(stretch(grey), self.settings.area, self.settings.stability, self.settings.top)
        shown = np.repeat(stretch(picture)[..., None], 3, -1) if kind == "infrared" else picture
        return self._generator.generate(np.ascontiguousarray(shown))

    @cached_property
    def _generator(self) -> Any:
        from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

        s = self.settings
        network = self._network or sam_model_registry[s.model](checkpoint=s.checkpoint)
        network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return SamAutomaticMaskGenerator(
            network, points_per_side=s.points, pred_iou_thresh=s.quality, stability_score_thresh=s.stability
        )


def merge(segments: Sequence[dict], kind: str, picture: np.ndarray, settings: MaskSettings) -> np.ndarray:
    """S segments (segmentation bool [H,W], predicted_iou, stability_score) -> one mask uint8 [H,W].

    kind: "infrared", picture uint8 [H,W]; "visible", [H,W,3]. No segment that counts: zeros.
    """
    grey = picture.astype(np.float64)
    grey = grey if grey.ndim == 2 else grey.mean(-1)
    slope = np.hypot(sobel(grey, 0), sobel(grey, 1)) if kind == "visible" else None
    low, high = settings.area
    scored = []
    for segment in segments:
        inside = segment["segmentation"].astype(bool)
        if low <= inside.mean() <= high:
            stands_out = _edged(slope, inside) if kind == "visible" else _hot(grey, inside)
            scored.append((segment["predicted_iou"] * segment["stability_score"] * stands_out, inside))
    scored = sorted(scored, key=lambda pair: -pair[0])[: settings.top]
    mask = np.zeros(grey.shape)
    for score, inside in scored:
        mask[inside] = np.maximum(mask[inside], score > 0 if settings.mode == "union" else score)
    if mask.max() > 0:
        mask /= mask.max()
    return np.rint(255 * (mask > 0.5 if settings.mode == "binary" else mask)).astype(np.uint8)


def _hot(grey: np.ndarray, inside: np.ndarray) -> float:
    """In [0,1]: by how many deviations of the picture a segment is brighter than the ring around it, of two."""
    ring = maximum_filter(inside, 2 * RING + 1) & ~inside
    if not ring.any():
        return 0.0
    return float(np.clip((grey[inside].mean() - grey[ring].mean()) / (grey.std() + 1e-6), 0, 2) / 2)


def _edged(slope: np.ndarray, inside: np.ndarray) -> float:
    """In [0,1]: the mean gradient inside against the picture's, of two."""
    return float(np.clip(slope[inside].mean() / (slope.mean() + 1e-6), 0, 2) / 2)


def stretch(picture: np.ndarray) -> np.ndarray:
    """uint8 [H,W] with its 1 and 99 percentiles drawn to 0 and 255; SAM knows no dark infrared."""
    low, high = np.percentile(picture, (1, 99))
    return np.rint(np.clip((picture - low) / max(high - low, 1.0), 0, 1) * 255).astype(np.uint8)


def _read(path: Path, size: tuple[int, int]) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"There is no mask {path}; compute it, or set masks.backend to none.")
    mask = read_png(path)
    if mask.shape != tuple(size):
        raise UsageError(f"The mask {path} is {mask.shape}, its picture {tuple(size)}; compute it again.")
    return mask


def morph(masks: Tensor, radius: int) -> Tensor:
    """Grown (radius > 0) or shrunk (< 0) by a square of 2 |radius| + 1 pixels: [B,1,H,W] -> [B,1,H,W]."""
    if radius == 0:
        return masks
    sign, side = (1 if radius > 0 else -1), 2 * abs(radius) + 1
    return sign * F.max_pool2d(sign * masks, side, 1, abs(radius))


def disturb(masks: Tensor, radius: int = 5, drop: float = 0.1) -> Tensor:
    """Each of [B,1,H,W] grown or shrunk by up to `radius` pixels, or emptied with probability `drop`.

    For training, so that sampling bears wrong masks and none at all. Draws from torch's global generator.
    """
    radii = torch.randint(-radius, radius + 1, (len(masks),)).tolist()
    kept = (torch.rand(len(masks)) >= drop).to(masks)[:, None, None, None]
    return kept * torch.cat([morph(mask[None], r) for mask, r in zip(masks, radii, strict=True)])
