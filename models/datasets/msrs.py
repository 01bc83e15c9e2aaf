"""MSRS: aligned infrared and visible road scenes by day and night, 480x640, eight classes.

Source: Tang, Yuan, Zhang, Jiang, Ma, "PIAFusion", Information Fusion 2022; made from MFNet (Ha et al., IROS 2017).
Read in the published tree, or flat as `models/datasets/folder.py` describes; then the infrared frames of a folder
`msrs_ir_unlabelled` beside it are added as "unlabelled".
"""

from __future__ import annotations

from pathlib import Path

from models.datasets.base import COLOURS, FileDataset, Item, frame_id, pictures, unique
from models.datasets.folder import flat_items


class MSRS(FileDataset):
    """Each fold leaves car or person among the base classes; guardrail is too rare to ask for (8 frames of 271)."""

    name = "msrs"
    homepage = "https://github.com/Linfeng-Tang/MSRS"
    citation = (
        "Tang, L., Yuan, J., Zhang, H., Jiang, X., Ma, J.: PIAFusion: A progressive infrared and visible image fusion "
        "network based on illumination aware. Information Fusion, 2022."
    )
    layout = "{train,test}/{ir,vi,Segmentation_labels}/*.png"
    classes = ("car", "person", "bike", "curve", "car_stop", "guardrail", "color_cone", "bump")
    palette = COLOURS[:8]
    folds = (("car", "bump"), ("person", "curve"), ("bike", "car_stop", "color_cone"))
    ignored = ("guardrail",)

    def items(self) -> list[Item]:
        if (self.root / "train" / "ir").is_dir() or (self.root / "test" / "ir").is_dir():
            return self._published()
        if (self.root / "infrared").is_dir():
            return self._flat()
        raise self.missing(self.root)

    def _published(self) -> list[Item]:
        items = []
        for split in ("train", "test"):
            visible = pictures(self.root, f"{split}/vi")
            for stem, (infrared, *_) in pictures(self.root, f"{split}/ir").items():
                label = f"{split}/Segmentation_labels/{stem}.png"
                items.append(Item(frame_id(stem), split, infrared, visible.get(stem, [None])[0], label))
        return unique(items)

    def _flat(self) -> list[Item]:
        items = flat_items(self.root)
        listed = {item.id for item in items}
        more = Path("..") / "msrs_ir_unlabelled"
        if not (self.root / more / "infrared").is_dir():
            return items
        extra = flat_items(self.root / more)
        return items + [
            Item(item.id, "unlabelled", (more / item.infrared).as_posix()) for item in extra if item.id not in listed
        ]
