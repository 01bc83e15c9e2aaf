"""Pictures: what is drawn where, and that no figure leaks into pyplot."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from models.errors import UsageError
from models.plots import (
    Example,
    contact_sheet,
    grid,
    iou,
    label_sheet,
    overlay,
    painted,
    png,
    score_bars,
    stretch,
)

RED = (200, 20, 20)


def square(side: int = 12, low: int = 4, high: int = 9) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    mask[low:high, low:high] = 1
    return mask


def example(**changes) -> Example:
    picture, truth = np.full((12, 12), 90, np.uint8), square()
    parts = {"name": "person", "colour": RED, "support": picture, "support_mask": truth, "query": picture}
    return Example(**{**parts, "truth": truth, "predictions": {"infrared": truth, "fusion": truth}, **changes})


def texts(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in (axis.title, *axis.texts) if text.get_text()]


def tree(fold_values: dict, miou: float | None) -> dict:
    def leaf(value):
        return {"value": value, "low": value and value - 0.1, "high": value and value + 0.1, "episodes": 5}

    return {"folds": {fold: {"miou": leaf(value)} for fold, value in fold_values.items()}, "miou": leaf(miou)}


def test_iou_counts_foreground_only_where_the_truth_is_known():
    truth, mask = square(), square(low=4, high=8)
    assert iou(mask, truth) == pytest.approx(100 * 16 / 25)
    truth[8, :] = 255
    truth[:, 8] = 255
    assert iou(mask, truth) == pytest.approx(100)
    assert np.isnan(iou(np.zeros_like(mask), np.zeros_like(truth)))


def test_overlay_outlines_in_the_pure_colour_and_tints_inside():
    drawn = overlay(np.full((12, 12), 100, np.uint8), square(), RED)
    assert tuple(drawn[4, 4]) == RED, "the rim carries the class colour"
    assert tuple(drawn[6, 6]) == (140, 68, 68), "the inside is 40 % colour"
    assert tuple(drawn[0, 0]) == (100, 100, 100), "the background is untouched"


def test_overlay_greys_what_nobody_labelled():
    mask = np.full((4, 4), 255, np.uint8)
    assert tuple(overlay(np.zeros((4, 4, 3), np.uint8), mask, RED)[1, 1]) == (64, 64, 64)


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(UsageError, match="one size"):
        overlay(np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8), RED)


def test_stretch_lifts_a_dark_night_and_leaves_colour_alone():
    dark = np.tile(np.arange(0, 40, dtype=np.uint8), (40, 1))
    assert stretch(dark).max() == 255
    assert stretch(dark).min() == 0
    assert stretch(np.full((3, 3), 7, np.uint8)).max() == 0, "a flat frame divides by nothing"
    colour = np.full((3, 3, 3), 7, np.uint8)
    assert stretch(colour) is colour


def test_grid_names_columns_classes_and_scores():
    figure = grid([example(), example(name="car", predictions={"infrared": 1 - square(), "fusion": square()})])
    assert texts(figure)[:6] == ["Support", "person", "Query", "Ground truth", "Infrared only", "100"]
    assert "Fused" in texts(figure)
    assert "car" in texts(figure)
    assert "0" in texts(figure), "a prediction that misses everything scores 0"
    assert len(figure.axes) == 2 * 5


@pytest.mark.parametrize("rows", [[], [example(), example(predictions={"fusion": square()})]])
def test_grid_wants_rows_with_the_same_columns(rows):
    with pytest.raises(UsageError, match="at least one example"):
        grid(rows)


def test_contact_sheet_takes_grey_and_colour_of_any_size():
    figure = contact_sheet([np.zeros((8, 12), np.uint8), np.zeros((6, 6, 3), np.uint8)] * 3, list("abcdef"))
    assert len(figure.axes) == 8, "two rows of four cells"
    assert [axis.get_title(loc="left") for axis in figure.axes] == [*"abcdef", "", ""]
    assert sum(bool(axis.images) for axis in figure.axes) == 6


@pytest.mark.parametrize(("images", "titles"), [([], []), ([np.zeros((4, 4), np.uint8)], ["a", "b"])])
def test_contact_sheet_wants_a_title_per_image(images, titles):
    with pytest.raises(UsageError, match="one title per image"):
        contact_sheet(images, titles)


def test_score_bars_draw_value_and_interval_in_points():
    (axis,) = score_bars({"fusion": tree({"0": 0.3, "1": 0.5}, 0.4)}).axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([30, 50, 40])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fold 0", "fold 1", "mean"]
    (whiskers,) = axis.containers[1].lines[2]
    assert whiskers.get_segments()[2][:, 0] == pytest.approx([30, 50])


def test_score_bars_leave_a_gap_where_there_is_no_value_and_no_mean_of_one_fold():
    (axis,) = score_bars({"fusion": tree({"0": 0.3}, 0.3), "rgb": tree({"0": None}, None)}).axes
    assert len(axis.patches) == 1
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fold 0"]


def test_score_bars_want_a_score():
    with pytest.raises(UsageError, match="evaluate first"):
        score_bars({})


def test_png_is_transparent_and_no_figure_is_registered_anywhere():
    picture = Image.open(io.BytesIO(png(grid([example()]), dpi=40)))
    assert picture.mode == "RGBA"
    assert picture.getpixel((picture.width // 2, 0))[3] == 0, "the margin shows the page"
    assert not Gcf.figs, "pyplot would keep every figure of a night alive"


def test_a_painted_label_shows_every_class_in_its_own_colour():
    label = np.zeros((12, 12), np.uint8)
    label[1:5, 1:5], label[6:11, 6:11], label[0, 8] = 1, 3, 255
    drawn = painted(np.full((12, 12, 3), 100, np.uint8), label, [RED, (0, 0, 0), (20, 200, 20)])
    assert tuple(drawn[1, 1]) == RED and tuple(drawn[6, 6]) == (20, 200, 20)
    assert tuple(drawn[2, 2]) == (140, 68, 68) and tuple(drawn[0, 0]) == (100, 100, 100)
    assert tuple(drawn[0, 8]) == (114, 114, 114)


def test_a_sheet_of_labels_has_a_row_per_picture_and_a_column_per_step():
    rows = [(name, np.full((12, 12, 3), 90, np.uint8), {"Y0": square(), "Y1": square()}) for name in ("disc", "ring")]
    figure = label_sheet(rows, [RED])
    assert texts(figure) == ["Picture", "disc", "Y0", "Y1", "ring"]
    assert [len(axis.images) for axis in figure.axes] == [1] * 6
    with pytest.raises(UsageError, match="the same steps"):
        label_sheet([rows[0], ("x", rows[0][1], {"Y0": square()})], [RED])
    with pytest.raises(UsageError, match="at least one"):
        label_sheet([], [RED])
