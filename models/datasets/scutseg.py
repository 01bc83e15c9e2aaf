"""SCUT-Seg: thermal night driving, 576x720, nine classes and background.

Source: Xiong, Cai, Liu, "MCNet: Multi-level Correction Network for thermal image semantic segmentation of nighttime
driving scene", Infrared Physics & Technology 2021. Folds: SCUT-3i, contiguous or interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from models.datasets.base import COLOURS, FileDataset, Item, frame_id, make_folds, pictures, read_lines, unique


class SCUTSeg(FileDataset):
    """folds: "contiguous" | "interleaved" (three of three classes), a number, or lists of class names."""

    name = "scutseg"
    homepage = "https://github.com/haitaobiyao/MCNet"
    citation = (
        "Xiong, H., Cai, W., Liu, Q.: MCNet: Multi-level Correction Network for thermal image semantic segmentation of "
        "nighttime driving scene. Infrared Physics & Technology, 2021."
    )
    layout = "{scut_train.txt, scut_val.txt, images/**/*.jpg, gt_instance/**/*_labelIds.png}"
    classes = ("road", "person", "rider", "car", "truck", "fence", "tree", "bus", "pole")
    palette = COLOURS[:9]
    raw_ids = {0: 0, 7: 1, 24: 2, 25: 3, 26: 4, 27: 5, 13: 6, 21: 7, 28: 8, 17: 9}  # noqa: RUF012 - Cityscapes-like ids

    image_folders = ("images", "image")
    label_folders = ("gt_instance", "gt_labels")

    def __init__(self, root: Path | str | None, *, folds: str | int | Sequence[Sequence[str]] = "contiguous") -> None:
        super().__init__(root)
        self.folds = make_folds(self.classes, 3, folds)

    def items(self) -> list[Item]:
        lists = {"train": self.root / "scut_train.txt", "test": self.root / "scut_val.txt"}
        if not all(path.is_file() for path in lists.values()):
            raise self.missing(self.root)
        images = self._pictures(self.image_folders)
        labels = self._pictures(self.label_folders)
        return unique(
            self._item(images, labels, Path(line.split()[0]), split)
            for split, path in lists.items()
            for line in read_lines(path)
        )

    def _pictures(self, folders: tuple[str, ...]) -> dict[str, list[str]]:
        folder = next((folder for folder in folders if (self.root / folder).is_dir()), None)
        if folder is None:
            raise self.missing(self.root)
        return pictures(self.root, folder)

    def _item(self, images: dict[str, list[str]], labels: dict[str, list[str]], listed: Path, split: str) -> Item:
        """One line of a list, `image_subpath mask_subpath`: the first says which frame, the second is not needed."""
        found = images.get(listed.stem, [f"images/{listed.as_posix()}"])
        infrared = max(found, key=lambda path: _shared(path, listed))
        inside = Path(*Path(infrared).parts[1:]).with_suffix("")
        # Where several frames have one name, a label from another folder would be the wrong one.
        same = [path for path in labels.get(f"{inside.name}_labelIds", []) if len(found) == 1 or _shared(path, inside)]
        label = max(same, key=lambda path: _shared(path, inside), default=f"gt_instance/{inside.name}_labelIds.png")
        return Item(frame_id(inside.as_posix()), split, infrared, label=label)


def _shared(path: str, listed: Path) -> int:
    """How many folders, from the last one up, two paths have in common."""
    pairs = zip(reversed(Path(path).parent.parts), reversed(listed.parent.parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
