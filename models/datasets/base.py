"""What a dataset is, and the reading that all file datasets share.

Legend: H, W picture height and width in pixels; C number of classes.
Label values: 0 background, 1..C classes, 255 ignore.
"""

from __future__ import annotations

import colorsys
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from models import DATASETS, find
from models.datasets.reading import check_sizes, map_ids, read_ids, read_infrared, read_visible
from models.errors import BadSample, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
COLOURS = (  # far apart in RGB, readable over grey pictures; the order is part of every figure, so only append
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240),
    (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128), (220, 190, 255), (170, 110, 40), (255, 250, 200),
    (128, 0, 0), (170, 255, 195), (128, 128, 0), (100, 60, 20), (0, 0, 128), (128, 128, 128),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One frame as a dataset lists it. Paths are relative to the root; None where the layer does not exist.

    split: "train" | "test" | "unlabelled" (infrared without a label) | "visible" (a lone RGB picture).
    """

    id: str
    split: str
    infrared: str | None = None
    visible: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Picture:
    """The pixels of one item: infrared uint8 [H,W], visible uint8 [H,W,3], label uint8 [H,W]; None where absent."""

    infrared: np.ndarray | None = None
    visible: np.ndarray | None = None
    label: np.ndarray | None = None


@runtime_checkable
class Dataset(Protocol):
    """A collection of thermal frames with class masks.

    Class ids are the position in `classes` plus one. `folds` holds the novel class names of each fold; classes in
    `ignored` read as 255 and belong to no fold. The constructor raises UsageError when root or layout is missing;
    `read` raises BadSample with the reason when one frame cannot be used.
    """

    name: str
    homepage: str
    citation: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    folds: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...]

    def items(self) -> list[Item]: ...
    def read(self, item: Item) -> Picture: ...


def open_dataset(name: str, root: Path | str | None, options: Mapping[str, Any]) -> Dataset:
    """The dataset of that name. Raises UsageError for a name, an option or a folder that does not exist."""
    kind = find(DATASETS, name)
    known = list(inspect.signature(kind).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(f"Dataset {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    return kind(root, **options)


class FileDataset:
    """Datasets that are files under one root. A subclass states its facts and lists its items.

    `raw_ids` maps the ids of the label files to ids 0..C; without it they are the same. Raw ids that are not in the
    map, and are not 255, make a frame a BadSample.
    """

    name: str
    homepage: str = ""
    citation: str = ""
    layout: ClassVar[str] = ""
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    folds: tuple[tuple[str, ...], ...] = ()
    ignored: tuple[str, ...] = ()
    raw_ids: dict[int, int] | None = None

    def __init__(self, root: Path | str | None) -> None:
        if root is None or not Path(root).is_dir():
            raise self.missing(root)
        self.root = Path(root)

    def missing(self, path: Path | str | None) -> UsageError:
        source = f" with the data of {self.homepage}" if self.homepage else ""
        where = path if path is not None else f"<data>/{self.name}"
        return UsageError(
            f"{self.name}: nothing usable at {where}; make that folder{source}, laid out as {self.layout}."
        )

    def items(self) -> list[Item]:
        raise self.missing(self.root)

    def read(self, item: Item) -> Picture:
        """The pixels of `item`. Raises BadSample when a file is missing, corrupt, of another size or out of range."""
        infrared = read_infrared(self.root / item.infrared) if item.infrared else None
        visible = read_visible(self.root / item.visible) if item.visible else None
        label = self.read_label(self.root / item.label) if item.label else None
        check_sizes(infrared=infrared, visible=visible, label=label)
        return Picture(infrared, visible, label)

    def read_label(self, path: Path) -> np.ndarray:
        if not path.is_file():
            raise BadSample(f"unlabelled: there is no {path.name}")
        raw_ids = self.raw_ids or {i: i for i in range(len(self.classes) + 1)}
        ignored = [self.classes.index(name) + 1 for name in self.ignored]
        return map_ids(read_ids(path), raw_ids, ignored, path.name)


def frame_id(path: str) -> str:
    """A file-name safe id from a path without its suffix: `a/b c` -> `a__b-c`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.strip("/").replace("/", "__"))


def stem_of(name: str) -> str:
    """A listed name without its picture suffix, if it has one."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name


def unique(items: Iterable[Item]) -> list[Item]:
    """Items with repeated lines dropped. Raises UsageError when one id means two frames or two splits."""
    seen: dict[str, Item] = {}
    for item in items:
        if seen.setdefault(item.id, item) != item:
            raise UsageError(
                f"The frame id {item.id!r} is listed twice ({seen[item.id].split} and {item.split}); "
                "rename one file or take it off one list."
            )
    return list(seen.values())


def read_lines(path: Path) -> list[str]:
    """The lines of a list file that are not empty, stripped."""
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def pictures(root: Path, folder: str) -> dict[str, list[str]]:
    """Stem -> paths relative to root of the pictures anywhere under `root/folder`, sorted."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / folder).rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.stem, []).append(path.relative_to(root).as_posix())
    return found


def contiguous(classes: Sequence[str], count: int) -> tuple[tuple[str, ...], ...]:
    """`count` folds of neighbouring classes (PASCAL-5i style); the first ones take the remainder."""
    size, rest = divmod(len(classes), count)
    if not classes:
        return ()
    starts = [i * size + min(i, rest) for i in range(count + 1)]
    return tuple(tuple(classes[start:stop]) for start, stop in pairwise(starts))


def interleaved(classes: Sequence[str], count: int) -> tuple[tuple[str, ...], ...]:
    """`count` folds {i, i + count, i + 2 count, ...} (COCO-20i style)."""
    return tuple(tuple(classes[start::count]) for start in range(count))


def make_folds(
    classes: Sequence[str], count: int, choice: str | int | Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Folds as a person may ask for them: a style ("contiguous", "interleaved"), a number, or the lists themselves."""
    styles = {"contiguous": contiguous, "interleaved": interleaved}
    if isinstance(choice, str):
        if choice not in styles:
            raise UsageError(f"There are no {choice!r} folds; choose contiguous or interleaved, or list the classes.")
        return styles[choice](classes, count)
    if isinstance(choice, int):
        if not 1 <= choice <= max(len(classes), 1):
            raise UsageError(f"{len(classes)} classes do not make {choice} folds; choose 1..{len(classes)}.")
        return contiguous(classes, choice)
    return tuple(tuple(fold) for fold in choice)


def check_folds(classes: Sequence[str], folds: Sequence[Sequence[str]], ignored: Sequence[str]) -> None:
    """Raises UsageError unless every fold names known classes, none twice, and none of the ignored."""
    named = [name for fold in folds for name in fold]
    unknown = sorted(set(named) - set(classes))
    if unknown:
        raise UsageError(f"The folds name {', '.join(unknown)}; the classes are {', '.join(classes)}.")
    twice = sorted({name for name in named if named.count(name) > 1} | (set(named) & set(ignored)))
    if twice:
        raise UsageError(f"The folds name {', '.join(twice)} twice or although ignored; name each class in one fold.")


def colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` fixed colours; past the hand-picked ones, steps of the golden angle around the colour wheel."""
    more = (colorsys.hsv_to_rgb(i * 0.61803399 % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.2 * (i % 3)) for i in range(count))
    extra = tuple(tuple(round(255 * part) for part in colour) for colour in more)
    return (COLOURS + extra)[:count]
