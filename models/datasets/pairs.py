"""Aligned infrared and visible pairs without class masks: M3FD, LLVIP and RoadScene.

They serve to fuse and to measure fusion; every pair is "unlabelled". Files are matched by their stems, never by their
place in a listing: two of the sets hold stray files (Thumbs.db). Infrared stored as three channels is read as grey.
A pair that lacks one picture, or whose pictures differ in size, is listed and fails when it is read.
"""

from __future__ import annotations

from pathlib import Path

from models.datasets.base import FileDataset, Item, frame_id, pictures, unique
from models.errors import UsageError


class PairDataset(FileDataset):
    """Two folders of pictures. A subclass names them: pairs of folders, of which the first that exists counts."""

    folders: tuple[tuple[str, str], ...] = ()

    def __init__(self, root: Path | str | None) -> None:
        super().__init__(root)
        if not self._present():
            raise self.missing(root)

    def _present(self) -> list[tuple[str, str]]:
        return [pair for pair in self.folders if all((self.root / folder).is_dir() for folder in pair)][:1]

    def items(self) -> list[Item]:
        return unique(item for pair in self._present() for item in self._pairs(*pair))

    def _pairs(self, infrared: str, visible: str, prefix: str = "") -> list[Item]:
        layers = [pictures(self.root, folder) for folder in (infrared, visible)]
        suffix = next((Path(paths[0]).suffix for paths in layers[0].values()), ".png")
        return [
            Item(
                frame_id(prefix + stem),
                "unlabelled",
                layers[0].get(stem, [f"{infrared}/{stem}{suffix}"])[0],
                layers[1].get(stem, [f"{visible}/{stem}{suffix}"])[0],
            )
            for stem in sorted(set().union(*layers))
        ]


class M3FD(PairDataset):
    """Streets, roads and campus at all times, mostly 1024x768; the detection part (4,200 pairs), or the 300 to fuse."""

    name = "m3fd"
    homepage = "https://github.com/JinyuanLiu-CV/TarDAL"
    citation = (
        "Liu, J., Fan, X., Huang, Z., Wu, G., Liu, R., Zhong, W., Luo, Z.: Target-aware dual adversarial learning and "
        "a multi-scenario multi-modality benchmark to fuse infrared and visible for object detection. CVPR, 2022."
    )
    layout = "{ir,vi}/*.png, or {Ir,Vis}/*.png as first published"
    folders = (("ir", "vi"), ("Ir", "Vis"))


class LLVIP(PairDataset):
    """Pedestrians by night, 1280x1024. part: "train", "test" or "all" of the published parts."""

    name = "llvip"
    homepage = "https://github.com/bupt-ai-cz/LLVIP"
    citation = (
        "Jia, X., Zhu, C., Li, M., Tang, W., Zhou, W.: LLVIP: A visible-infrared paired dataset for low-light vision. "
        "ICCV Workshops, 2021."
    )
    layout = "{infrared,visible}/{train,test}/*.jpg"
    parts = ("train", "test")

    def __init__(self, root: Path | str | None, *, part: str = "test") -> None:
        if part not in (*self.parts, "all"):
            raise UsageError(f"LLVIP has no part {part!r}; choose train, test or all.")
        wanted = self.parts if part == "all" else (part,)
        self.folders = tuple((f"infrared/{name}", f"visible/{name}") for name in wanted)
        super().__init__(root)

    def items(self) -> list[Item]:
        named = [(*folders, folders[0].rpartition("/")[2] + "/") for folders in self.folders]
        return unique(item for infrared, visible, prefix in named for item in self._pairs(infrared, visible, prefix))


class RoadScene(PairDataset):
    """221 aligned road scenes out of FLIR's videos, of many sizes.

    The visible pictures are those of infrared's size (`crop_LR_visible`); `crop_HR_visible` is stretched unevenly.
    """

    name = "roadscene"
    homepage = "https://github.com/hanna-xu/RoadScene"
    citation = (
        "Xu, H., Ma, J., Le, Z., Jiang, J., Guo, X.: FusionDN: A unified densely connected network for image fusion. "
        "AAAI, 2020."
    )
    layout = "cropinfrared/*.jpg and crop_LR_visible/*.jpg"
    folders = (("cropinfrared", "crop_LR_visible"),)
