"""What every dataset of the table keeps to, on its miniature."""

from itertools import combinations

import numpy as np
import pytest

from models import DATASETS
from models.datasets.base import Dataset, open_dataset
from models.datasets.pairs import PairDataset
from models.errors import UsageError
from tests.models.datasets.miniatures import MINIATURES, miniature

pytestmark = pytest.mark.parametrize("name", sorted(DATASETS))


@pytest.fixture
def dataset(name, tmp_path):
    return miniature(name, tmp_path / name)


def test_it_describes_itself(dataset):
    assert isinstance(dataset, Dataset)
    assert dataset.name and len(set(dataset.classes)) == len(dataset.classes)
    assert isinstance(dataset, PairDataset) == (not dataset.classes), "only pairs for fusion have no classes"
    assert len(dataset.palette) == len(dataset.classes)


def test_its_colours_can_be_told_apart(dataset):
    distances = [np.abs(np.subtract(a, b)).sum() for a, b in combinations(((0, 0, 0), *dataset.palette), 2)]
    assert min(distances, default=100) > 60


def test_folds_partition_the_classes_that_are_not_ignored(dataset):
    named = [name for fold in dataset.folds for name in fold]
    assert len(dataset.folds) >= (2 if dataset.classes else 0)
    assert sorted(named) == sorted(set(dataset.classes) - set(dataset.ignored))


def test_items_have_safe_unique_ids_and_known_splits(dataset):
    items = dataset.items()
    ids = [item.id for item in items]
    assert len(set(ids)) == len(ids) > 0
    assert all(set(id) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for id in ids)
    splits = {item.split for item in items}
    assert {"train", "test"} <= splits <= {"train", "test", "unlabelled", "visible"} or not dataset.classes
    assert splits == {"unlabelled"} or dataset.classes
    assert dataset.classes or all(item.infrared and item.visible for item in items), "a pair is two pictures"
    assert all(item.label for item in items if item.split in ("train", "test"))
    assert items == dataset.items()


def test_pictures_are_uint8_of_one_size_with_known_labels(dataset):
    known = {0, 255, *range(1, len(dataset.classes) + 1)}
    for item in dataset.items():
        picture = dataset.read(item)
        layers = {name: getattr(picture, name) for name in ("infrared", "visible", "label")}
        present = {name: layer for name, layer in layers.items() if layer is not None}
        assert {name for name in layers if getattr(item, name)} == set(present)
        assert {layer.dtype for layer in present.values()} == {np.dtype(np.uint8)}
        assert len({layer.shape[:2] for layer in present.values()}) == 1
        assert picture.visible is None or picture.visible.shape[2:] == (3,)
        assert picture.label is None or set(np.unique(picture.label)) <= known


def test_ignored_classes_never_show(dataset):
    hidden = [dataset.classes.index(name) + 1 for name in dataset.ignored]
    labels = [dataset.read(item).label for item in dataset.items() if item.label]
    assert not any(np.isin(label, hidden).any() for label in labels)


def test_every_class_is_somewhere(dataset, name):
    if name == "toy":
        dataset = open_dataset("toy", None, {"train": 40, "test": 0})
    seen = set().union(*(np.unique(dataset.read(item).label).tolist() for item in dataset.items() if item.label))
    wanted = {i for i, name in enumerate(dataset.classes, 1) if name not in dataset.ignored}
    assert wanted <= seen


def test_reading_twice_gives_the_same(dataset):
    for item in dataset.items():
        first, second = dataset.read(item), dataset.read(item)
        for layer in ("infrared", "visible", "label"):
            assert np.array_equal(getattr(first, layer), getattr(second, layer))


def test_an_unknown_option_lists_the_known_ones(dataset, name):
    with pytest.raises(UsageError, match="no option wheels; it has"):
        open_dataset(name, getattr(dataset, "root", None), {"wheels": 4})


def test_a_missing_root_names_the_folder_to_make_and_the_source(dataset, name, tmp_path):
    if name not in MINIATURES:
        return
    with pytest.raises(UsageError, match="make that folder") as caught:
        open_dataset(name, tmp_path / "nowhere", {})
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert type(dataset).homepage in str(caught.value)
    with pytest.raises(UsageError, match="make that folder"):
        open_dataset(name, None, {})


def test_an_empty_root_is_refused(name, tmp_path):
    if name in MINIATURES:
        with pytest.raises(UsageError, match="make that folder"):
            open_dataset(name, tmp_path, {}).items()
