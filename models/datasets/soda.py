"""SODA: thermal scenes indoors and on streets, 480x640, 20 classes.

Source: Li, Xia, Luo, Tang, Cheng, "Segmenting Objects in Day and Night: Edge-Conditioned CNN for Thermal Image Semantic
Segmentation", arXiv 1907.10303. Folds: SODA-5i, contiguous like PASCAL-5i, or interleaved like COCO-20i.
The Cityscapes-derived synthetic part of the distribution is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.datasets.base import COLOURS, FileDataset, Item, frame_id, make_folds, pictures, read_lines, stem_of, unique


class SODA(FileDataset):
    """folds: "contiguous" | "interleaved" (four of five classes), a number, or lists of class names."""

    name = "soda"
    homepage = "https://arxiv.org/abs/1907.10303"
    citation = (
        "Li, C., Xia, W., Yan, Y., Luo, B., Tang, J.: Segmenting Objects in Day and Night: Edge-Conditioned CNN for "
        "Thermal Image Semantic Segmentation. IEEE TNNLS, 2021."
    )
    layout = (
        "InfraredSemanticLabel/{train_infrared.txt, test_infrared.txt, JPEGImages/**/*.jpg, "
        "SegmentationClassOne/**/*.png}"
    )
    classes = (
        *("person", "building", "tree", "road", "pole"),
        *("grass", "door", "table", "chair", "car"),
        *("bicycle", "lamp", "monitor", "traffic_cone", "trash_can"),
        *("animal", "fence", "sky", "river", "sidewalk"),
    )
    palette = COLOURS

    def __init__(self, root: Path | str | None, *, folds: str | int | Sequence[Sequence[str]] = "contiguous") -> None:
        super().__init__(root)
        self.folds = make_folds(self.classes, 4, folds)
        inner = self.root / "InfraredSemanticLabel"
        self.root = inner if inner.is_dir() else self.root
        if not (self.root / "JPEGImages").is_dir():
            raise self.missing(root)

    def items(self) -> list[Item]:
        images = pictures(self.root, "JPEGImages")
        lists = {split: self.root / f"{split}_infrared.txt" for split in ("train", "test")}
        if not all(path.is_file() for path in lists.values()):
            raise self.missing(self.root)
        return unique(
            self._item(images, stem_of(line.split()[0]), split)
            for split, path in lists.items()
            for line in read_lines(path)
            if not is_stray(line)
        )

    def _item(self, images: dict[str, list[str]], stem: str, split: str) -> Item:
        """A stem that lies in several folders means the first that has a label."""
        found = images.get(stem, [f"JPEGImages/{stem}.jpg"])
        pairs = [(path, _label_of(path)) for path in found]
        infrared, label = next((pair for pair in pairs if (self.root / pair[1]).is_file()), pairs[0])
        return Item(frame_id(stem), split, infrared, label=label)


def is_stray(name: str) -> bool:
    """Left-over copies in the distribution: `ABCD (1)`, `~temp_ABCD`."""
    return "(" in name or "~" in name


def _label_of(image: str) -> str:
    return Path(image.replace("JPEGImages", "SegmentationClassOne", 1)).with_suffix(".png").as_posix()
