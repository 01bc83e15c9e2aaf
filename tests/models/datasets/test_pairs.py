import numpy as np
import pytest
from PIL import Image

from models.datasets.pairs import LLVIP, M3FD, RoadScene
from models.errors import BadSample, UsageError
from tests.models.datasets.miniatures import colour, grey, llvip, m3fd, roadscene, save


def test_m3fd_in_both_spellings(tmp_path):
    root = m3fd(tmp_path / "m3fd")
    items = M3FD(root).items()
    assert [(item.id, item.infrared, item.visible) for item in items] == [
        ("00000", "ir/00000.png", "vi/00000.png"), ("00001", "ir/00001.png", "vi/00001.png"),
    ]  # fmt: skip
    picture = M3FD(root).read(items[0])
    assert np.array_equal(picture.infrared, grey(0)), "24-bit grey is one channel"
    (root / "ir").rename(root / "Ir"), (root / "vi").rename(root / "Vis")
    assert M3FD(root).items()[0].infrared == "Ir/00000.png"


def test_llvip_by_parts(tmp_path):
    root = llvip(tmp_path)
    assert [item.id for item in LLVIP(root).items()] == ["test__190001"]
    assert [item.id for item in LLVIP(root, part="all").items()] == ["train__010001", "test__190001"]
    with pytest.raises(UsageError, match="choose train, test or all"):
        LLVIP(root, part="val")


def test_roadscene_takes_the_visible_of_infrareds_size(tmp_path):
    dataset = RoadScene(roadscene(tmp_path))
    items = dataset.items()
    assert [item.id for item in items] == ["FLIR_00006", "FLIR_00018"], "Thumbs.db is no picture"
    for item in items:
        assert item.visible.startswith("crop_LR_visible/")
        picture = dataset.read(item)
        assert picture.visible.shape[:2] == picture.infrared.shape


@pytest.mark.parametrize("folder", ["cropinfrared", "crop_LR_visible"])
def test_an_orphan_is_listed_and_fails_when_read(tmp_path, folder):
    root = roadscene(tmp_path)
    (root / folder / "FLIR_00006.jpg").unlink()
    dataset = RoadScene(root)
    assert [item.id for item in dataset.items()] == ["FLIR_00006", "FLIR_00018"], "the others keep their partners"
    with pytest.raises(BadSample, match=r"no file FLIR_00006\.jpg"):
        dataset.read(dataset.items()[0])


def test_a_pair_of_two_sizes_is_refused(tmp_path):
    root = m3fd(tmp_path)
    save(root / "vi" / "00001.png", colour(1)[1:])
    dataset = M3FD(root)
    with pytest.raises(BadSample, match="differ in size"):
        dataset.read(dataset.items()[1])


def test_grey_visible_is_shown_in_three_channels(tmp_path):
    root = m3fd(tmp_path)
    Image.fromarray(grey(7)).save(root / "vi" / "00000.png")
    picture = M3FD(root).read(M3FD(root).items()[0])
    assert np.array_equal(picture.visible[..., 1], grey(7)) and picture.visible.shape[2] == 3
