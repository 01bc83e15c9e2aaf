"""COCO: colour pictures of 80 classes of things, and the folds COCO-20i.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. Read with the masks that few-shot work
distributes (annotations/<split>/*.png, ids 0..80), or else from the published instances_<split>.json, whose outlines
are drawn here: the smaller instance in front, crowds as 255. Pictures are visible; there is no infrared.

Folds: COCO-20i is interleaved, fold i = classes i, i + 4, i + 8 ... (Nguyen and Todorovic, ICCV 2019).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from models.datasets.base import FileDataset, Item, frame_id, make_folds, pictures, unique
from models.datasets.reading import IGNORE
from models.errors import BadSample, UsageError

UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # category ids 1..90 that no class has


def lattice(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` <= 124 colours of five levels a channel, 63 or more apart from each other and from black."""
    levels = (0, 64, 128, 192, 255)
    places = [n * 47 % 125 for n in range(1, 125)]  # 47 and 125 have no common divisor: neighbours look unlike
    return tuple((levels[n // 25], levels[n // 5 % 5], levels[n % 5]) for n in places)[:count]


class COCO(FileDataset):
    """folds: "interleaved" (COCO-20i), "contiguous", a number, or lists of class names. year: 2014 or 2017."""

    name = "coco"
    homepage = "https://cocodataset.org"
    citation = (
        "Lin, T.-Y., Maire, M., Belongie, S., Hays, J., Perona, P., Ramanan, D., Dollar, P., Zitnick, C. L.: "
        "Microsoft COCO: Common Objects in Context. ECCV, 2014."
    )
    layout = "{train2014,val2014}/*.jpg and annotations/{train2014,val2014}/*.png or annotations/instances_*.json"
    classes = (
        *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
        *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
        *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
        *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
        *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
        *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
        *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard"),
        *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors"),
        *("teddy bear", "hair drier", "toothbrush"),
    )
    palette = lattice(80)

    def __init__(
        self, root: Path | str | None, *, folds: str | int | Sequence[Sequence[str]] = "interleaved", year: int = 0,
    ) -> None:
        super().__init__(root)
        self.folds = make_folds(self.classes, 4, folds)
        found = [y for y in (2014, 2017) if (self.root / f"val{y}").is_dir()]
        if not found:
            raise self.missing(root)
        self.year = year or found[0]
        if self.year not in found:
            raise UsageError(f"coco: {self.root} has no val{year}; set year to {found[0]}.")

    def items(self) -> list[Item]:
        listed = [item for split, name in (("train", "train"), ("test", "val"))
                  for item in self._split(split, f"{name}{self.year}")]
        if not listed:
            raise self.missing(self.root)
        return unique(listed)

    def _split(self, split: str, folder: str) -> list[Item]:
        found = pictures(self.root, folder)
        if (self.root / "annotations" / folder).is_dir():
            masks = pictures(self.root, f"annotations/{folder}")
            pairs = [(paths[0], masks[stem][0]) for stem, paths in found.items() if stem in masks]
        else:
            name = f"annotations/instances_{folder}.json"
            pairs = [(paths[0], f"{name}#{stem}") for stem, paths in found.items() if stem in self._outlines(name)]
        return [Item(frame_id(Path(picture).stem), split, visible=picture, label=label) for picture, label in pairs]

    def read_label(self, path: Path) -> np.ndarray:
        if "#" not in path.name:
            return super().read_label(path)
        name, _, stem = path.name.partition("#")
        size, instances = self._outlines(f"annotations/{name}")[stem]
        return draw_instances(size, instances, stem)

    def _outlines(self, name: str) -> dict[str, tuple[tuple[int, int], list[dict]]]:
        """Stem of a picture -> (height, width) and its annotations; pictures without any are left out."""
        if name not in self._read_annotations:
            path = self.root / name
            if not path.is_file():
                raise self.missing(self.root)
            table = json.loads(path.read_text(encoding="utf-8"))
            images = {image["id"]: image for image in table["images"]}
            grouped: dict[str, tuple[tuple[int, int], list[dict]]] = {}
            for annotation in table["annotations"]:
                image = images[annotation["image_id"]]
                size = (image["height"], image["width"])
                grouped.setdefault(Path(image["file_name"]).stem, (size, []))[1].append(annotation)
            self._read_annotations[name] = grouped
        return self._read_annotations[name]

    @cached_property
    def _read_annotations(self) -> dict[str, dict]:
        return {}


def draw_instances(size: tuple[int, int], instances: Sequence[dict], name: str = "the frame") -> np.ndarray:
    """uint8 [H, W] of class ids 1..80 from COCO annotations; large ones first, so that small ones stay visible."""
    label = np.zeros(size, dtype=np.uint8)
    ids = {raw: n for n, raw in enumerate((i for i in range(1, 91) if i not in UNUSED), start=1)}
    for instance in sorted(instances, key=lambda x: (not x.get("iscrowd", 0), -x["area"], x["id"])):
        if instance["category_id"] not in ids:
            raise BadSample(f"{name} holds category {instance['category_id']}, which no class has")
        crowd = bool(instance.get("iscrowd", 0))
        outline = instance["segmentation"]
        mask = run_lengths(outline, size, name) if isinstance(outline, dict) else polygons(outline, size)
        label[mask] = IGNORE if crowd else ids[instance["category_id"]]
    return label


def polygons(outlines: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] of polygons x0, y0, x1, y1 ..."""
    image = Image.new("1", (size[1], size[0]))
    for points in outlines:
        ImageDraw.Draw(image).polygon([tuple(pair) for pair in np.reshape(points, (-1, 2)).tolist()], fill=1)
    return np.array(image)


def run_lengths(outline: dict, size: tuple[int, int], name: str) -> np.ndarray:
    """bool [H, W] of run lengths, zeros first, down the columns."""
    counts = outline["counts"]
    if tuple(outline["size"]) != tuple(size) or isinstance(counts, str) or sum(counts) != size[0] * size[1]:
        raise BadSample(f"{name} holds run lengths that do not fit its size")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[::-1]).T
