"""FMB: aligned infrared and visible road scenes at all times of day, 600x800, 14 classes.

Source: Liu et al., "Multi-interactive Feature Learning and a Full-time Multi-modality Benchmark for Image Fusion and
Segmentation", ICCV 2023, arXiv 2308.02097. 1,220 frames to train, 280 to test; no bicycle is in the test part, so
that bicycles can be learnt but not asked for. `color/` is a rendering of the labels and is never read: forks disagree
about its colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.datasets.base import COLOURS, FileDataset, Item, frame_id, make_folds, pictures, unique


class FMB(FileDataset):
    """folds: "contiguous" | "interleaved" (four), a number, or lists of class names.

    A frame that lacks one of its three files is listed, and fails when it is read: early uploads had such orphans.
    """

    name = "fmb"
    homepage = "https://github.com/JinyuanLiu-CV/SegMiF"
    citation = (
        "Liu, J., Liu, Z., Wu, G., Ma, L., Liu, R., Zhong, W., Luo, Z., Fan, X.: Multi-interactive feature learning "
        "and a full-time multi-modality benchmark for image fusion and segmentation. ICCV, 2023."
    )
    layout = "{train,test}/{Infrared,Visible,Label}/*.png"
    classes = (
        *("road", "sidewalk", "building", "traffic_lamp", "traffic_sign", "vegetation", "sky"),
        *("person", "car", "truck", "bus", "motorcycle", "bicycle", "pole"),
    )
    palette = COLOURS[:14]

    def __init__(self, root: Path | str | None, *, folds: str | int | Sequence[Sequence[str]] = "interleaved") -> None:
        super().__init__(root)
        self.folds = make_folds(self.classes, 4, folds)
        if not any((self.root / split / "Infrared").is_dir() for split in ("train", "test")):
            raise self.missing(root)

    def items(self) -> list[Item]:
        return unique(item for split in ("train", "test") for item in self._split(split))

    def _split(self, split: str) -> list[Item]:
        found = {layer: pictures(self.root, f"{split}/{layer}") for layer in ("Infrared", "Visible", "Label")}
        stems = sorted(set().union(*found.values()))
        paths = {stem: [_path(found[layer], f"{split}/{layer}", stem) for layer in found] for stem in stems}
        return [Item(frame_id(stem), split, *paths[stem]) for stem in stems]


def _path(found: dict[str, list[str]], folder: str, stem: str) -> str:
    """The file, or where it should be."""
    return found.get(stem, [f"{folder}/{stem}.png"])[0]
