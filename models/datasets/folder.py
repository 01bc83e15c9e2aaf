"""Folder: a person's own frames, laid out flat.

root/infrared/<name>.png      grey, 8 or 16 bit, or any other picture suffix
root/label/<name>.png         class ids, 255 ignore      (without this folder every frame is "unlabelled")
root/visible/<name>.png       optional, aligned RGB
root/classes.txt              one class a line: `car`, or with its id in the label files `1 car`, `1,car`
root/train.txt, root/test.txt the names of each split; optionally unlabelled.txt
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from models.datasets.base import (
    FileDataset,
    Item,
    check_folds,
    colours,
    frame_id,
    make_folds,
    pictures,
    read_lines,
    stem_of,
    unique,
)
from models.errors import UsageError


class Folder(FileDataset):
    """folds: "contiguous" | "interleaved" (up to four), a number, or lists of class names. ignored: read as 255."""

    name = "folder"
    layout = "infrared/, label/, visible/ (optional), classes.txt, train.txt and test.txt"

    def __init__(
        self,
        root: Path | str | None,
        *,
        folds: str | int | Sequence[Sequence[str]] = "contiguous",
        ignored: Sequence[str] = (),
    ) -> None:
        super().__init__(root)
        if not (self.root / "infrared").is_dir():
            raise self.missing(self.root)
        self.name = self.root.name
        self.raw_ids, self.classes = self._classes()
        self.palette = colours(len(self.classes))
        self.ignored = tuple(ignored)
        asked = [name for name in self.classes if name not in self.ignored]
        self.folds = make_folds(asked, min(4, max(len(asked), 1)), folds)
        check_folds(self.classes, self.folds, self.ignored)

    def _classes(self) -> tuple[dict[int, int], tuple[str, ...]]:
        path = self.root / "classes.txt"
        if path.is_file():
            return read_classes(path)
        if (self.root / "label").is_dir():
            raise UsageError(f"{self.name}: write {path} with the name of one class a line, in the order of their ids.")
        return {0: 0}, ()

    def items(self) -> list[Item]:
        return flat_items(self.root)


def read_classes(path: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    """Raw id -> class id 0..C, and the names, of a classes.txt. Lines may name background (0) and ignore (255), too."""
    lines = read_lines(path)
    numbered = [re.fullmatch(r"(\d+)\s*[\s,;:]\s*(\S.*)", line) for line in lines]
    if lines and all(numbered):
        pairs = [(int(match[1]), match[2]) for match in numbered]
    else:
        pairs = list(enumerate((line for line in lines if line not in ("background", "ignore")), start=1))
    pairs = [(raw, name) for raw, name in pairs if raw not in (0, 255)]
    names = tuple(name for _, name in pairs)
    raws = [raw for raw, _ in pairs]
    if not names or len(set(names)) < len(names) or len(set(raws)) < len(raws) or max(raws) > 254:
        raise UsageError(f"{path} must name one class or more, each name and id (1..254) once.")
    return {0: 0} | {raw: label for label, raw in enumerate(raws, start=1)}, names


def flat_items(root: Path) -> list[Item]:
    """The items of a flat folder. A listed frame whose file or label is missing is listed, and fails when read."""
    layers = {layer: pictures(root, layer) for layer in ("infrared", "visible", "label")}
    lists = {split: root / f"{split}.txt" for split in ("train", "test", "unlabelled")}
    names = {split: read_lines(path) for split, path in lists.items() if path.is_file()}
    if not (root / "label").is_dir():
        names = {"unlabelled": [*chain(*names.values())] or list(layers["infrared"])}
    if not names:
        raise UsageError(f"{root.name}: write {lists['train']} and {lists['test']} with the name of one frame a line.")
    return unique(_item(layers, stem_of(name), split) for split, stems in names.items() for name in stems)


def _item(layers: dict[str, dict[str, list[str]]], stem: str, split: str) -> Item:
    infrared = layers["infrared"].get(stem, [f"infrared/{stem}.png"])[0]
    visible = layers["visible"].get(stem, [None])[0]
    label = layers["label"].get(stem, [f"label/{stem}.png"])[0] if split != "unlabelled" else None
    return Item(frame_id(stem), split, infrared, visible, label)
