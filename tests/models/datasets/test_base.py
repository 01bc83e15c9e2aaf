import pytest

from models.datasets.base import (
    COLOURS,
    Item,
    check_folds,
    colours,
    contiguous,
    frame_id,
    interleaved,
    make_folds,
    open_dataset,
    stem_of,
    unique,
)
from models.errors import UsageError


def test_ids_are_safe_file_names():
    assert frame_id("set 1/V000/frame#2") == "set-1__V000__frame-2"
    assert frame_id("00001D") == "00001D"


def test_only_picture_suffixes_are_cut():
    assert [stem_of(name) for name in ("a.png", "a.JPG", "a.b", "a")] == ["a", "a", "a.b", "a"]


def test_a_repeated_line_is_one_item():
    item = Item("a", "train", "a.png")
    assert unique([item, item]) == [item]


@pytest.mark.parametrize("other", [Item("a", "test", "a.png"), Item("a", "train", "b.png")])
def test_one_id_for_two_frames_or_splits_is_refused(other):
    with pytest.raises(UsageError, match="'a' is listed twice"):
        unique([Item("a", "train", "a.png"), other])


def test_contiguous_folds_follow_pascal_and_interleaved_ones_coco():
    classes = "abcdefgh"
    assert contiguous(classes, 4) == (("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"))
    assert interleaved(classes, 4) == (("a", "e"), ("b", "f"), ("c", "g"), ("d", "h"))


def test_the_first_folds_take_the_remainder():
    assert contiguous("abcde", 2) == (("a", "b", "c"), ("d", "e"))
    assert contiguous((), 1) == ()


def test_folds_may_be_a_style_a_number_or_lists():
    assert make_folds("abcd", 2, "interleaved") == (("a", "c"), ("b", "d"))
    assert make_folds("abcd", 2, 4) == (("a",), ("b",), ("c",), ("d",))
    assert make_folds("abcd", 2, [["a"], ["d"]]) == (("a",), ("d",))


@pytest.mark.parametrize("choice", ["random", 0, 5])
def test_folds_that_cannot_be_are_refused(choice):
    with pytest.raises(UsageError, match="choose"):
        make_folds("abcd", 2, choice)


@pytest.mark.parametrize(
    ("folds", "ignored", "said"),
    [([["a", "x"]], (), "name x"), ([["a"], ["a"]], (), "twice"), ([["a"], ["b"]], ("b",), "ignored")],
)
def test_folds_must_name_known_classes_once(folds, ignored, said):
    with pytest.raises(UsageError, match=said):
        check_folds("ab", folds, ignored)


def test_there_are_always_enough_colours():
    assert colours(20) == COLOURS
    assert len(set(colours(60))) == 60


def test_a_dataset_from_outside_needs_no_line_in_the_table():
    dataset = open_dataset("models.datasets.toy:Toy", None, {"train": 1})
    assert dataset.name == "toy"


def test_an_unknown_dataset_lists_the_known_ones():
    with pytest.raises(UsageError, match="Did you mean 'msrs'"):
        open_dataset("mrss", None, {})
