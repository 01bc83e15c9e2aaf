import pytest

from models.datasets.soda import SODA
from models.errors import BadSample, UsageError
from tests.models.datasets.miniatures import grey, label, save, soda


def test_stray_copies_and_second_columns_are_skipped(tmp_path):
    items = SODA(soda(tmp_path)).items()
    assert [(item.id, item.split) for item in items] == [("day_1", "train"), ("day_2", "train"), ("night_1", "test")]
    assert items[0].label == "SegmentationClassOne/set1/day_1.png"


def test_the_root_may_be_the_inner_folder(tmp_path):
    root = soda(tmp_path)
    assert SODA(root).items() == SODA(root / "InfraredSemanticLabel").items()


def test_a_stem_in_two_folders_means_the_labelled_one(tmp_path):
    root = soda(tmp_path)
    save(root / "InfraredSemanticLabel" / "JPEGImages" / "a_first" / "day_1.jpg", grey(5))
    assert SODA(root).items()[0].infrared == "JPEGImages/set1/day_1.jpg"


def test_a_listed_frame_that_is_missing_fails_when_read(tmp_path):
    root = soda(tmp_path)
    (root / "InfraredSemanticLabel" / "JPEGImages" / "set1" / "day_2.jpg").unlink()
    dataset = SODA(root)
    with pytest.raises(BadSample, match=r"no file day_2\.jpg"):
        dataset.read(dataset.items()[1])


def test_a_missing_list_is_told(tmp_path):
    root = soda(tmp_path)
    (root / "InfraredSemanticLabel" / "test_infrared.txt").unlink()
    with pytest.raises(UsageError, match="test_infrared"):
        SODA(root).items()


def test_folds_are_soda_5i_or_interleaved(tmp_path):
    root = soda(tmp_path)
    assert SODA(root).folds[2] == ("bicycle", "lamp", "monitor", "traffic_cone", "trash_can")
    assert SODA(root, folds="interleaved").folds[0] == ("person", "pole", "chair", "monitor", "fence")


def test_ids_beyond_20_are_refused(tmp_path):
    root = soda(tmp_path)
    save(root / "InfraredSemanticLabel" / "SegmentationClassOne" / "set1" / "day_1.png", label(21))
    dataset = SODA(root)
    with pytest.raises(BadSample, match=r"\[21\]"):
        dataset.read(dataset.items()[0])
