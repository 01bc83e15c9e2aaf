import numpy as np
import pytest

from models.datasets.scutseg import SCUTSeg
from models.errors import BadSample, UsageError
from tests.models.datasets.miniatures import label, save, scutseg


def test_raw_ids_are_mapped_in_the_published_order(tmp_path):
    dataset = SCUTSeg(scutseg(tmp_path))
    assert np.array_equal(dataset.read(dataset.items()[0]).label, label(1, 2, 3, 4, 5, 6, 7, 8, 9))


def test_the_first_column_says_which_frame(tmp_path):
    items = SCUTSeg(scutseg(tmp_path)).items()
    assert [(item.id, item.split) for item in items] == [
        ("set01__V000_1", "train"),
        ("set01__V000_2", "train"),
        ("set02__V000_1", "test"),
    ]


def test_equal_names_in_two_folders_are_kept_apart(tmp_path):
    """set01/V000_1 and set02/V000_1 share a file name; each gets the picture and label of its own folder."""
    items = SCUTSeg(scutseg(tmp_path)).items()
    assert items[0].infrared == "images/set01/V000_1.jpg" and items[2].infrared == "images/set02/V000_1.jpg"
    assert items[2].label == "gt_instance/set02/V000_1_labelIds.png"


def test_the_other_published_folder_names_are_read_too(tmp_path):
    root = scutseg(tmp_path)
    (root / "images").rename(root / "image")
    (root / "gt_instance").rename(root / "gt_labels")
    dataset = SCUTSeg(root)
    assert dataset.items()[0].infrared == "image/set01/V000_1.jpg"
    assert dataset.read(dataset.items()[0]).label is not None


def test_a_train_id_in_a_label_file_is_refused(tmp_path):
    root = scutseg(tmp_path)
    save(root / "gt_instance" / "set01" / "V000_1_labelIds.png", label(7, 1))
    dataset = SCUTSeg(root)
    with pytest.raises(BadSample, match=r"label ids \[1\]"):
        dataset.read(dataset.items()[0])


def test_a_missing_label_is_told_and_not_taken_from_another_folder(tmp_path):
    root = scutseg(tmp_path)
    (root / "gt_instance" / "set01" / "V000_1_labelIds.png").unlink()
    dataset = SCUTSeg(root)
    with pytest.raises(BadSample, match="unlabelled"):
        dataset.read(dataset.items()[0])


def test_a_label_in_a_folder_of_its_own_is_found_by_name(tmp_path):
    root = scutseg(tmp_path)
    (root / "gt_instance" / "set01" / "V000_2_labelIds.png").rename(root / "gt_instance" / "V000_2_labelIds.png")
    assert SCUTSeg(root).items()[1].label == "gt_instance/V000_2_labelIds.png"


def test_a_missing_frame_or_list_is_told(tmp_path):
    root = scutseg(tmp_path)
    (root / "images" / "set01" / "V000_2.jpg").unlink()
    dataset = SCUTSeg(root)
    with pytest.raises(BadSample, match="no file"):
        dataset.read(dataset.items()[1])
    (root / "scut_val.txt").unlink()
    with pytest.raises(UsageError, match="scut_val"):
        dataset.items()


def test_folds_are_scut_3i_or_interleaved(tmp_path):
    root = scutseg(tmp_path)
    assert SCUTSeg(root).folds[0] == ("road", "person", "rider")
    assert SCUTSeg(root, folds="interleaved").folds[0] == ("road", "car", "tree")
