import numpy as np
import pytest

from models.datasets.fmb import FMB
from models.errors import BadSample
from tests.models.datasets.miniatures import colour, fmb, grey, save


def test_both_parts_are_read_by_index(tmp_path):
    dataset = FMB(fmb(tmp_path))
    assert [(item.id, item.split) for item in dataset.items()] == [
        ("00001", "train"), ("00002", "train"), ("00003", "test"),
    ]  # fmt: skip
    assert set(np.unique(dataset.read(dataset.items()[0]).label)) == {*range(15)}
    assert dataset.classes[7 - 1] == "sky" and dataset.classes[13 - 1] == "bicycle" and len(dataset.classes) == 14


def test_renderings_are_never_read(tmp_path):
    root = fmb(tmp_path)
    before = [item.label for item in FMB(root).items()]
    save(root / "train" / "color" / "00009.png", colour(1))
    assert [item.label for item in FMB(root).items()] == before


@pytest.mark.parametrize("folder", ["Infrared", "Visible", "Label"])
def test_an_orphan_is_listed_and_fails_when_read(tmp_path, folder):
    root = fmb(tmp_path)
    (root / "train" / folder / "00002.png").unlink()
    dataset = FMB(root)
    orphan = dataset.items()[1]
    assert orphan.id == "00002"
    with pytest.raises(BadSample, match=r"no (file )?00002\.png"):
        dataset.read(orphan)
    assert dataset.read(dataset.items()[0]).label is not None


def test_pictures_of_two_sizes_are_refused(tmp_path):
    root = fmb(tmp_path)
    save(root / "train" / "Infrared" / "00001.png", grey(1)[1:])
    dataset = FMB(root)
    with pytest.raises(BadSample, match="differ in size"):
        dataset.read(dataset.items()[0])


def test_folds_as_asked(tmp_path):
    root = fmb(tmp_path)
    assert FMB(root).folds[0] == ("road", "traffic_sign", "car", "bicycle")
    assert len(FMB(root, folds=2).folds) == 2
