"""The frames of one prepared dataset, read from a local folder.

Layers lie in `images/<id>.<layer>.png`. Legend: H, W height and width in pixels.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from models.errors import UsageError


def png_bytes(array: np.ndarray) -> bytes:
    """uint8 [H,W] or [H,W,3] as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def read_png(path: Path | str) -> np.ndarray:
    """uint8 [H,W] or [H,W,3]."""
    with Image.open(path) as image:
        return np.array(image)


def layer_name(id: str, layer: str) -> str:
    """Where a layer of a frame lies inside the folder of its stage."""
    return f"images/{id}.{layer}.png"


class Frames:
    """One prepared dataset: a table of frames, their pictures, and what the classes and folds are.

    rows: id, split, infrared, visible, label (relative file names or None), height, width, sha256,
    classes (JSON: class id -> pixels). info: dataset, classes, palette, folds, ignored.
    """

    def __init__(self, folder: Path | str, rows: pd.DataFrame, info: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.rows = rows.reset_index(drop=True)
        self.info = info
        self.dataset: str = info["dataset"]
        self.classes = tuple(info["classes"])
        self.palette = tuple(tuple(colour) for colour in info["palette"])
        self.folds = tuple(tuple(fold) for fold in info["folds"])
        self.ignored = tuple(info["ignored"])
        self._rows = {row["id"]: row for row in self.rows.to_dict("records")}
        self._pixels: dict[str, dict[int, int]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Frames:
        """The frames of a committed stage folder (`rows.parquet` and the meta of `manifest.json`)."""
        folder = Path(folder)
        info = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["meta"]
        return cls(folder, pd.read_parquet(folder / "rows.parquet"), info)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: str) -> bool:
        return id in self._rows

    def ids(self, split: str | None = None) -> list[str]:
        """The ids of a split ("train", "test", "unlabelled", "visible"), or all, in table order."""
        return [id for id, row in self._rows.items() if split in (None, row["split"])]

    def split(self, id: str) -> str:
        return self._rows[id]["split"]

    def size(self, id: str) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        return int(self._rows[id]["height"]), int(self._rows[id]["width"])

    def has(self, id: str, layer: str) -> bool:
        """Whether the frame has the layer "infrared", "visible" or "label"."""
        return isinstance(self._rows[id][layer], str)

    def path(self, id: str, layer: str) -> Path:
        """The file of a layer. Raises UsageError when the frame has no such layer."""
        if not self.has(id, layer):
            raise UsageError(f"Frame {id} of {self.dataset} has no {layer} picture; choose data that has one.")
        return self.folder / self._rows[id][layer]

    def infrared(self, id: str) -> np.ndarray:
        """uint8 [H,W]."""
        return read_png(self.path(id, "infrared"))

    def visible(self, id: str) -> np.ndarray:
        """uint8 [H,W,3]."""
        return read_png(self.path(id, "visible"))

    def label(self, id: str) -> np.ndarray:
        """uint8 [H,W]: 0 background, 1..C classes, 255 ignore."""
        return read_png(self.path(id, "label"))

    def pixels(self, id: str) -> dict[int, int]:
        """Class id -> number of pixels, for the classes 1..C that the frame holds."""
        if id not in self._pixels:
            stored = json.loads(self._rows[id]["classes"] or "{}")
            self._pixels[id] = {int(label): int(count) for label, count in stored.items()}
        return self._pixels[id]

    def class_name(self, label: int) -> str:
        return self.classes[label - 1]

    def novel(self, fold: int) -> tuple[int, ...]:
        """Ids of the classes that training must not see. Raises UsageError for a fold that does not exist."""
        if not 0 <= fold < len(self.folds):
            raise UsageError(f"{self.dataset} has the folds 0..{len(self.folds) - 1}; there is no fold {fold}.")
        return tuple(sorted(self.classes.index(name) + 1 for name in self.folds[fold]))

    def base(self, fold: int) -> tuple[int, ...]:
        """Ids of the classes of training: neither novel in this fold nor ignored."""
        novel = self.novel(fold)
        names = enumerate(self.classes, start=1)
        return tuple(label for label, name in names if label not in novel and name not in self.ignored)
