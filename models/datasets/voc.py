"""PASCAL VOC 2012 with the SBD masks: colour pictures of 20 classes, and the folds PASCAL-5i and PASCAL-10i.

Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010; masks of 10,582 training frames from
Hariharan et al., "Semantic contours from inverse detectors", ICCV 2011. Pictures are visible; there is no infrared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.datasets.base import COLOURS, FileDataset, Item, frame_id, make_folds, read_lines, stem_of, unique


class VOC(FileDataset):
    """folds: "contiguous" (PASCAL-5i), 2 (PASCAL-10i), "interleaved", another number, or lists of class names.

    The training list is the first that exists of trainaug, train_aug and train; each line is an id, or the paths of a
    picture and its mask.
    """

    name = "voc"
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC"
    citation = (
        "Everingham, M., Van Gool, L., Williams, C. K. I., Winn, J., Zisserman, A.: The PASCAL Visual Object Classes "
        "(VOC) Challenge. International Journal of Computer Vision, 2010."
    )
    layout = (
        "VOCdevkit/VOC2012/{JPEGImages/*.jpg, SegmentationClassAug/*.png or SegmentationClass/*.png, "
        "ImageSets/Segmentation/{trainaug.txt or train.txt, val.txt}}"
    )
    classes = (
        *("aeroplane", "bicycle", "bird", "boat", "bottle"), *("bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person"),
        *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    )
    palette = COLOURS
    train_lists = ("trainaug", "train_aug", "train")
    mask_folders = ("SegmentationClassAug", "SegmentationClass")

    def __init__(self, root: Path | str | None, *, folds: str | int | Sequence[Sequence[str]] = "contiguous") -> None:
        super().__init__(root)
        self.folds = make_folds(self.classes, 4, folds)
        inner = [self.root / "VOCdevkit" / "VOC2012", self.root / "VOC2012", self.root]
        self.root = next((path for path in inner if (path / "JPEGImages").is_dir()), self.root)
        if not (self.root / "JPEGImages").is_dir():
            raise self.missing(root)

    def items(self) -> list[Item]:
        lists = self.root / "ImageSets" / "Segmentation"
        train = next((lists / f"{name}.txt" for name in self.train_lists if (lists / f"{name}.txt").is_file()), None)
        if train is None or not (lists / "val.txt").is_file():
            raise self.missing(self.root)
        held = {_stem(line) for line in read_lines(lists / "val.txt")}
        listed = [_stem(line) for line in read_lines(train)]  # the SBD list and val overlap in some distributions
        return unique([
            *(self._item(stem, "train") for stem in listed if stem not in held),
            *(self._item(_stem(line), "test") for line in read_lines(lists / "val.txt")),
        ])

    def _item(self, stem: str, split: str) -> Item:
        masks = [f"{folder}/{stem}.png" for folder in self.mask_folders]
        label = next((mask for mask in masks if (self.root / mask).is_file()), masks[-1])
        return Item(frame_id(stem), split, visible=f"JPEGImages/{stem}.jpg", label=label)


def _stem(line: str) -> str:
    return stem_of(Path(line.split()[0]).name)
