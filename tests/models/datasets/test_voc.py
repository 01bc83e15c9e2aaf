import numpy as np
import pytest

from models.datasets.voc import VOC
from models.errors import BadSample, UsageError
from tests.models.datasets.miniatures import label, save, voc


def test_lists_may_hold_ids_or_paths_and_val_stays_out_of_training(tmp_path):
    items = VOC(voc(tmp_path)).items()
    assert [(i.id, i.split) for i in items] == [
        ("2007_000032", "train"), ("2007_000039", "train"), ("2007_000033", "test")]
    assert items[0].visible == "JPEGImages/2007_000032.jpg" and items[0].infrared is None


def test_the_root_may_be_the_devkit_or_its_inside(tmp_path):
    root = voc(tmp_path)
    assert VOC(root).items() == VOC(root / "VOCdevkit").items() == VOC(root / "VOCdevkit" / "VOC2012").items()


def test_palette_masks_are_read_as_ids_with_their_void(tmp_path):
    dataset = VOC(voc(tmp_path))
    picture = dataset.read(dataset.items()[0])
    assert set(np.unique(picture.label)) == {0, *range(1, 21), 255} and picture.infrared is None


def test_folds_are_pascal_5i_or_10i(tmp_path):
    root = voc(tmp_path)
    assert VOC(root).folds[0] == ("aeroplane", "bicycle", "bird", "boat", "bottle")
    assert [len(fold) for fold in VOC(root, folds=2).folds] == [10, 10]
    assert VOC(root, folds=2).folds[1][0] == "diningtable"


def test_the_plain_masks_serve_where_the_augmented_are_missing(tmp_path):
    root = voc(tmp_path)
    inner = root / "VOCdevkit" / "VOC2012"
    (inner / "SegmentationClassAug").rename(inner / "SegmentationClass")
    (inner / "ImageSets" / "Segmentation" / "trainaug.txt").rename(inner / "ImageSets" / "Segmentation" / "train.txt")
    assert VOC(root).items()[0].label == "SegmentationClass/2007_000032.png"


def test_a_missing_list_and_a_wrong_id_are_told(tmp_path):
    root = voc(tmp_path)
    save(root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug" / "2007_000032.png", label(21))
    dataset = VOC(root)
    with pytest.raises(BadSample, match=r"\[21\]"):
        dataset.read(dataset.items()[0])
    (root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(UsageError, match="val"):
        VOC(root).items()
