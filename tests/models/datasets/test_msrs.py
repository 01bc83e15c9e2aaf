import numpy as np

from models.datasets.msrs import MSRS
from tests.models.datasets.miniatures import msrs, msrs_flat


def test_every_fold_leaves_car_or_person_to_learn_from():
    assert all({"car", "person"} - set(fold) for fold in MSRS.folds)


def test_the_published_tree(tmp_path):
    items = MSRS(msrs(tmp_path)).items()
    assert [(item.id, item.split) for item in items][:3] == [
        ("00001D", "train"),
        ("00002N", "train"),
        ("00003D", "test"),
    ]
    assert items[0].visible == "train/vi/00001D.png" and items[0].label == "train/Segmentation_labels/00001D.png"


def test_the_flat_layout_takes_unlabelled_frames_from_beside_it(tmp_path):
    dataset = MSRS(msrs_flat(tmp_path / "msrs"))
    unlabelled = [item for item in dataset.items() if item.split == "unlabelled"]
    assert [item.id for item in unlabelled] == ["u0", "u1"]  # a0 is a labelled frame, so it is not taken again
    assert dataset.read(unlabelled[0]).infrared is not None
    assert unlabelled[0].label is None


def test_guardrail_is_always_ignored(tmp_path):
    dataset = MSRS(msrs(tmp_path))
    assert set(np.unique(dataset.read(dataset.items()[0]).label)) == {0, 1, 2, 3, 4, 5, 7, 8, 255}
