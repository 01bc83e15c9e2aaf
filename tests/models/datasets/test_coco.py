import numpy as np
import pytest

from models.datasets.coco import COCO, draw_instances, lattice, run_lengths
from models.errors import BadSample, UsageError
from tests.models.datasets.miniatures import HEIGHT, WIDTH, coco, coco_outlines


def test_folds_are_coco_20i(tmp_path):
    dataset = COCO(coco(tmp_path))
    assert len(dataset.classes) == 80
    assert dataset.folds[0][:4] == ("person", "airplane", "boat", "parking meter")
    assert [len(fold) for fold in dataset.folds] == [20] * 4
    assert dataset.folds[3][-1] == "toothbrush"


def test_pictures_without_a_mask_are_left_out(tmp_path):
    root = coco(tmp_path)
    (root / "annotations" / "val2014" / "COCO_val2014_000000000003.png").unlink()
    assert [item.id for item in COCO(root).items() if item.split == "test"] == [
        "COCO_val2014_000000000004", "COCO_val2014_000000000005"]


def test_outlines_are_drawn_with_the_small_one_in_front(tmp_path):
    dataset = COCO(coco_outlines(tmp_path))
    (train, test) = dataset.items()
    assert train.split == "train" and test.label == "annotations/instances_val2017.json#000000000017"
    found = dataset.read(test).label
    table, cup = dataset.classes.index("dining table") + 1, dataset.classes.index("cup") + 1
    assert found.shape == (HEIGHT, WIDTH) and set(np.unique(found)) == {0, table, cup, 255}
    assert found[15, 20] == table and found[11, 11] == cup and found[9, 11] == cup and found[3, 3] == 0
    assert (found[:, 28:] == 255).all() and (found[:, :28] != 255).all()


def test_category_ids_skip_what_no_class_has():
    outline = [[0, 0, 9, 0, 9, 9, 0, 9]]
    def drawn(category):
        return draw_instances((9, 9), [{"id": 1, "category_id": category, "area": 1, "segmentation": outline}])[4, 4]
    assert drawn(1) == 1 and drawn(13) == COCO.classes.index("stop sign") + 1 and drawn(90) == 80
    with pytest.raises(BadSample, match="category 12"):
        drawn(12)


def test_run_lengths_go_down_the_columns():
    found = run_lengths({"size": [3, 2], "counts": [1, 2, 1, 1, 1]}, (3, 2), "x")
    assert found.tolist() == [[False, False], [True, True], [True, False]]
    with pytest.raises(BadSample, match="do not fit"):
        run_lengths({"size": [3, 2], "counts": [1, 2]}, (3, 2), "x")


def test_a_year_that_is_not_there_names_one_that_is(tmp_path):
    root = coco(tmp_path)
    assert COCO(root).year == 2014
    with pytest.raises(UsageError, match="set year to 2014"):
        COCO(root, year=2017)


def test_the_lattice_has_no_colour_twice():
    assert len(set(lattice(124))) == 124 and (0, 0, 0) not in lattice(124)
