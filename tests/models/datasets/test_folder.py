import numpy as np
import pytest

from models.datasets.folder import Folder, read_classes
from models.errors import BadSample, UsageError
from tests.models.datasets.miniatures import folder, grey, label, save


@pytest.fixture
def root(tmp_path):
    return folder(tmp_path / "barn")


def by_id(dataset):
    return {item.id: item for item in dataset.items()}


def test_it_is_named_after_its_folder(root):
    assert Folder(root).name == "barn"


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n",
        "background\ncat\ndog\n",
        "0,background\n1,cat\n2,dog\n255,ignore\n",
        "1 cat\n2 dog\n",
        "1: cat\n2:dog",
    ],
)
def test_classes_may_be_written_in_many_ways(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    assert read_classes(tmp_path / "classes.txt") == ({0: 0, 1: 1, 2: 2}, ("cat", "dog"))


def test_ids_of_the_label_files_may_have_gaps(root):
    (root / "classes.txt").write_text("3 cat\n9 dog\n")
    save(root / "label" / "a0.png", label(9, 3))
    dataset = Folder(root)
    assert dataset.classes == ("cat", "dog")
    assert np.array_equal(dataset.read(by_id(dataset)["a0"]).label, label(2, 1))


@pytest.mark.parametrize("text", ["", "cat\ncat\n", "1 cat\n1 dog\n", "300 cat\n"])
def test_classes_that_cannot_be_are_refused(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UsageError, match="one class or more"):
        read_classes(tmp_path / "classes.txt")


def test_missing_classes_or_lists_say_what_to_write(root):
    (root / "train.txt").unlink()
    (root / "test.txt").unlink()
    with pytest.raises(UsageError, match=r"write .*train\.txt"):
        Folder(root).items()
    (root / "classes.txt").unlink()
    with pytest.raises(UsageError, match=r"write .*classes\.txt"):
        Folder(root)


def test_without_labels_every_frame_is_unlabelled(tmp_path):
    for name in "ab":
        save(tmp_path / "infrared" / f"{name}.png", grey(0))
    dataset = Folder(tmp_path)
    assert dataset.classes == dataset.folds == ()
    assert [(item.id, item.split, item.label) for item in dataset.items()] == [
        ("a", "unlabelled", None),
        ("b", "unlabelled", None),
    ]


def test_an_unlabelled_list_adds_frames_without_labels(root):
    save(root / "infrared" / "c0.png", grey(1))
    (root / "unlabelled.txt").write_text("c0\n")
    item = by_id(Folder(root))["c0"]
    assert item.split == "unlabelled" and item.label is None


def test_lists_may_name_files_with_their_suffix(root):
    (root / "train.txt").write_text("a0.png\n\n a1 \n")
    assert [item.id for item in Folder(root).items() if item.split == "train"] == ["a0", "a1"]


def test_visible_is_optional_frame_by_frame(root):
    (root / "visible" / "a0.jpg").unlink()
    dataset = Folder(root)
    assert dataset.read(by_id(dataset)["a0"]).visible is None
    assert dataset.read(by_id(dataset)["a1"]).visible is not None


def test_a_frame_whose_label_is_missing_fails_as_unlabelled(root):
    (root / "label" / "a0.png").unlink()
    dataset = Folder(root)
    with pytest.raises(BadSample, match="unlabelled"):
        dataset.read(by_id(dataset)["a0"])


def test_a_listed_frame_that_is_missing_fails_when_read(root):
    (root / "infrared" / "a0.png").unlink()
    dataset = Folder(root)
    with pytest.raises(BadSample, match=r"no file a0\.png"):
        dataset.read(by_id(dataset)["a0"])


@pytest.mark.parametrize("layer", ["label", "visible"])
def test_layers_of_another_size_are_refused(root, layer):
    save(next((root / layer).glob("a0.*")), np.zeros((10, 10), np.uint8))
    dataset = Folder(root)
    with pytest.raises(BadSample, match=rf"infrared 24x32.*{layer} 10x10"):
        dataset.read(by_id(dataset)["a0"])


def test_a_label_id_without_a_class_is_refused(root):
    save(root / "label" / "a0.png", label(1, 4))
    dataset = Folder(root)
    with pytest.raises(BadSample, match=r"label ids \[4\]"):
        dataset.read(by_id(dataset)["a0"])


def test_one_frame_on_both_lists_is_refused(root):
    (root / "test.txt").write_text("a0\n")
    with pytest.raises(UsageError, match="'a0' is listed twice"):
        Folder(root).items()


def test_folds_and_ignored_classes_are_options(root):
    assert Folder(root).folds == (("cat",), ("dog",), ("hen",))
    assert Folder(root, folds=[["hen"], ["cat", "dog"]]).folds == (("hen",), ("cat", "dog"))
    dataset = Folder(root, ignored=["dog"])
    assert dataset.folds == (("cat",), ("hen",))
    assert set(np.unique(dataset.read(dataset.items()[0]).label)) == {0, 1, 3, 255}
    with pytest.raises(UsageError, match="name cow"):
        Folder(root, folds=[["cow"]])
