"""Generated miniatures of the datasets: the published layout, tiny pictures, every class present."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from models.datasets.base import Dataset, open_dataset

HEIGHT, WIDTH = 24, 32


def save(path: Path, array: np.ndarray) -> Path:
    """Writes uint8 or uint16 pixels by the suffix of `path`, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def grey(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def colour(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def label(*ids: int) -> np.ndarray:
    """A label map in vertical stripes, background on the left."""
    stripes = np.array([0, *ids], dtype=np.uint8)
    return np.repeat(np.tile(stripes[np.arange(WIDTH) * len(stripes) // WIDTH], (HEIGHT, 1)), 1, axis=0)


def folder(root: Path, train: int = 4, test: int = 3, classes: tuple[str, ...] = ("cat", "dog", "hen")) -> Path:
    names = {"train": [f"a{i}" for i in range(train)], "test": [f"b{i}" for i in range(test)]}
    for seed, name in enumerate(names["train"] + names["test"]):
        save(root / "infrared" / f"{name}.png", grey(seed))
        save(root / "visible" / f"{name}.jpg", colour(seed))
        save(root / "label" / f"{name}.png", label(*range(1, len(classes) + 1)))
    (root / "classes.txt").write_text("\n".join(classes))
    for split, stems in names.items():
        (root / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return root


def msrs(root: Path) -> Path:
    for split, stems in {"train": ("00001D", "00002N"), "test": ("00003D", "00004N")}.items():
        for stem in stems:
            seed = int(stem[:5])
            save(root / split / "ir" / f"{stem}.png", grey(seed))
            save(root / split / "vi" / f"{stem}.png", colour(seed))
            save(root / split / "Segmentation_labels" / f"{stem}.png", label(1, 2, 3, 4, 5, 6, 7, 8))
    return root


def msrs_flat(root: Path) -> Path:
    names = ("car", "person", "bike", "curve", "car_stop", "guardrail", "color_cone", "bump")
    folder(root, classes=names)
    for seed, stem in enumerate(("u0", "u1", "a0")):  # a0 has a label in the labelled part
        save(root.parent / "msrs_ir_unlabelled" / "infrared" / f"{stem}.png", grey(seed))
    return root


def soda(root: Path) -> Path:
    inner = root / "InfraredSemanticLabel"
    stems = {"train": ("day_1", "day_2"), "test": ("night_1",)}
    for split, listed in stems.items():
        for seed, stem in enumerate(listed):
            save(inner / "JPEGImages" / "set1" / f"{stem}.jpg", grey(seed))
            save(inner / "SegmentationClassOne" / "set1" / f"{stem}.png", label(*range(1, 21)))
        lines = [f"{stem} 1" for stem in listed] + ["day_1 (1)", "~temp_day_2 1"]
        (inner / f"{split}_infrared.txt").write_text("\n".join(lines))
    save(inner / "JPEGImages" / "set1" / "day_1 (1).jpg", grey(9))
    return root


def scutseg(root: Path) -> Path:
    listed = {"train": ("set01/V000_1", "set01/V000_2"), "val": ("set02/V000_1",)}
    for split, stems in listed.items():
        for seed, stem in enumerate(stems):
            save(root / "images" / f"{stem}.jpg", grey(seed))
            save(root / "gt_instance" / f"{stem}.jpg", grey(seed))
            save(root / "gt_instance" / f"{stem}_labelIds.png", label(7, 24, 25, 26, 27, 13, 21, 28, 17))
        lines = [f"{stem}.jpg gt/{stem}_labelIds.png" for stem in stems]
        (root / f"scut_{split}.txt").write_text("\n".join(lines))
    return root


def voc(root: Path) -> Path:
    inner = root / "VOCdevkit" / "VOC2012"
    for seed, stem in enumerate(("2007_000032", "2007_000039", "2007_000033")):
        save(inner / "JPEGImages" / f"{stem}.jpg", colour(seed))
        mask = Image.fromarray(label(*range(1, 21), 255)).convert("P")
        (inner / "SegmentationClassAug").mkdir(parents=True, exist_ok=True)
        mask.save(inner / "SegmentationClassAug" / f"{stem}.png")
    lists = inner / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    lines = [f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png" for stem in ("2007_000032", "2007_000039")]
    (lists / "trainaug.txt").write_text("\n".join([*lines, "2007_000033"]))
    (lists / "val.txt").write_text("2007_000033\n")
    return root


def coco(root: Path) -> Path:
    for n, folder in enumerate(("train2014", "train2014", "train2014", "val2014", "val2014", "val2014")):
        stem = f"COCO_{folder}_{n:012d}"
        save(root / folder / f"{stem}.jpg", colour(n))
        save(root / "annotations" / folder / f"{stem}.png", label(*range(1 + 27 * (n % 3), min(28 + 27 * (n % 3), 81))))
    return root


def coco_outlines(root: Path) -> Path:
    """The published annotations of two pictures of 24 x 32: a table with a cup on it, and a crowd."""
    for folder, first in (("train2017", 7), ("val2017", 17)):
        save(root / folder / f"{first:012d}.jpg", colour(7))
        save(root / folder / f"{first + 1:012d}.jpg", colour(8))
        table = {"id": 1, "image_id": first, "category_id": 67, "area": 200, "iscrowd": 0,
                 "segmentation": [[4, 10, 27, 10, 27, 19, 4, 19]]}
        cup = {"id": 2, "image_id": first, "category_id": 47, "area": 30, "iscrowd": 0,
               "segmentation": [[10, 8, 13, 8, 13, 13, 10, 13]]}
        crowd = {"id": 3, "image_id": first, "category_id": 1, "area": 48, "iscrowd": 1,
                 "segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 28, HEIGHT * 4]}}
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": HEIGHT, "width": WIDTH} for n in (first, first + 1)]
        (root / "annotations").mkdir(exist_ok=True)
        text = json.dumps({"images": images, "annotations": [cup, table, crowd]})
        (root / "annotations" / f"instances_{folder}.json").write_text(text)
    return root


def fmb(root: Path) -> Path:
    for split, stems in {"train": ("00001", "00002"), "test": ("00003",)}.items():
        for stem in stems:
            save(root / split / "Infrared" / f"{stem}.png", grey(int(stem)))
            save(root / split / "Visible" / f"{stem}.png", colour(int(stem)))
            save(root / split / "Label" / f"{stem}.png", label(*range(1, 15)))
            save(root / split / "color" / f"{stem}.png", colour(9))
    return root


def m3fd(root: Path) -> Path:
    for seed, stem in enumerate(("00000", "00001")):
        save(root / "ir" / f"{stem}.png", np.repeat(grey(seed)[..., None], 3, -1))  # 24-bit grey, as published
        save(root / "vi" / f"{stem}.png", colour(seed))
    (root / "meta").mkdir()
    (root / "meta" / "val.txt").write_text("00000.png")
    return root


def llvip(root: Path) -> Path:
    for part, stem in (("train", "010001"), ("test", "190001")):
        save(root / "infrared" / part / f"{stem}.jpg", np.repeat(grey(1)[..., None], 3, -1))
        save(root / "visible" / part / f"{stem}.jpg", colour(1))
    return root


def roadscene(root: Path) -> Path:
    for seed, stem in enumerate(("FLIR_00006", "FLIR_00018")):
        height = HEIGHT - 3 * seed
        save(root / "cropinfrared" / f"{stem}.jpg", grey(seed)[:height])
        save(root / "crop_LR_visible" / f"{stem}.jpg", colour(seed)[:height])
        save(root / "crop_HR_visible" / f"{stem}.jpg", np.repeat(colour(seed), 3, 0))
    for folder in ("crop_LR_visible", "crop_HR_visible"):
        (root / folder / "Thumbs.db").write_bytes(b"no picture")
    return root


MINIATURES: dict[str, Callable[[Path], Path]] = {
    "folder": folder, "msrs": msrs, "soda": soda, "scutseg": scutseg, "voc": voc, "coco": coco,
    "fmb": fmb, "m3fd": m3fd, "llvip": llvip, "roadscene": roadscene,
}  # fmt: skip


def miniature(name: str, root: Path) -> Dataset:
    """The dataset `name`, tiny; what is drawn on demand needs no files."""
    if name == "toy":
        return open_dataset("toy", None, {"train": 3, "test": 2, "unlabelled": 1, "visible": 1, "size": (48, 64)})
    return open_dataset(name, MINIATURES[name](root), {})
