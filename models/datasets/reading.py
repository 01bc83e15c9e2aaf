"""Reading picture files of every kind that thermal datasets come in, and saying what is wrong with the others.

Legend: H, W height and width in pixels. Everything here raises BadSample with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from models.errors import BadSample

IGNORE = 255


def map_ids(raw: np.ndarray, ids: dict[int, int], ignored: Iterable[int] = (), name: str = "the label") -> np.ndarray:
    """Raw label ids [H,W] -> class ids uint8 [H,W] through a table, all at once; `ignored` class ids become 255."""
    table = np.full(256, -1, dtype=np.int16)
    for source, target in ids.items():
        table[source] = target
    table[IGNORE] = IGNORE
    table[np.isin(table, list(ignored))] = IGNORE
    label = table[raw]
    if (label < 0).any():
        raise BadSample(f"{name} holds label ids {sorted(set(raw[label < 0].tolist()))[:8]} that no class has")
    if (label == IGNORE).all():
        raise BadSample(f"unlabelled: {name} holds nothing but ignored pixels")
    return label.astype(np.uint8)


def open_image(path: Path) -> Image.Image:
    """A decoded picture. Raises BadSample when the file is missing, truncated or no picture."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError as error:
        raise BadSample(f"there is no file {path.name}") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path.name} cannot be decoded ({error.__class__.__name__}: {error})") from error
    return image


def read_infrared(path: Path) -> np.ndarray:
    """Grey uint8 [H,W]. 16-bit and float frames are scaled per frame; grey stored as RGB is accepted."""
    image = open_image(path)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return scale_to_8_bit(np.asarray(image))
    if image.mode in ("L", "LA", "1"):
        return np.asarray(image.convert("L"))
    channels = np.asarray(image.convert("RGB"))
    if np.ptp(channels.astype(np.int16), axis=2).max() > 3:  # 3: what JPEG chroma rounding can do to a grey picture
        raise BadSample(f"{path.name} is a colour picture where a grey infrared frame is expected")
    return np.ascontiguousarray(channels[..., 1])


def scale_to_8_bit(frame: np.ndarray) -> np.ndarray:
    """Counts [H,W] of any depth -> uint8 [H,W], the 0.1 and 99.9 percentiles going to 0 and 255."""
    if not np.isfinite(frame).all():
        raise BadSample("the infrared frame holds values that are not finite")
    low, high = np.percentile(frame, (0.1, 99.9))
    scaled = (frame.astype(np.float64) - low) / max(high - low, 1e-9)
    return np.round(np.clip(scaled, 0.0, 1.0) * 255).astype(np.uint8)


def read_visible(path: Path) -> np.ndarray:
    """RGB uint8 [H,W,3]."""
    return np.asarray(open_image(path).convert("RGB"))


def read_ids(path: Path) -> np.ndarray:
    """Label ids uint8 [H,W] as stored: grey values, palette indices, or three equal channels."""
    image = open_image(path)
    ids = np.asarray(image.convert("L") if image.mode == "LA" else image)
    if ids.ndim == 3:
        if np.ptp(ids[..., :3], axis=2).any():
            raise BadSample(f"{path.name} is a colour picture where class ids are expected")
        ids = ids[..., 0]
    if ids.dtype == bool:
        return ids.astype(np.uint8)
    if ids.min() < 0 or ids.max() > 255:
        raise BadSample(f"{path.name} holds label ids beyond 0..255")
    return ids.astype(np.uint8)


def check_sizes(**layers: np.ndarray | None) -> None:
    """Raises BadSample unless all layers present have one height and width."""
    sizes = {name: layer.shape[:2] for name, layer in layers.items() if layer is not None}
    if len(set(sizes.values())) > 1:
        spelled = ", ".join(f"{name} {height}x{width}" for name, (height, width) in sizes.items())
        raise BadSample(f"the layers differ in size ({spelled})")
