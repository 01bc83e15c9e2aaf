"""Charts of studies: what is drawn is what was given."""

from __future__ import annotations

import pytest

from models.charts import curves, dots
from models.errors import UsageError
from models.plots import png

ROWS = [{"row": name, "miou": value, "low": value - 2, "high": value + 3} for name, value in
        (("baseline", 10.0), ("method3", 14.0), ("f1", 12.0))]  # fmt: skip
CURVE = [(5, 6.0, 4.0, 8.0), (0, 12.0, 10.0, 14.0), (3, 9.0, 8.0, 11.0)]


def test_dots_have_a_line_per_row_from_the_top(tmp_path):
    figure = dots(ROWS, "baseline")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["baseline", "method3", "f1"]
    assert axis.yaxis_inverted()
    assert [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1] == [10.0, 14.0, 12.0]
    assert png(figure).startswith(b"\x89PNG")


def test_the_reference_has_a_rule():
    rules = [[line for line in dots(ROWS, name).axes[0].lines if list(line.get_xdata()) == [14.0, 14.0]]
             for name in ("method3", None)]  # fmt: skip
    assert len(rules[0]) == 1 and not rules[1]


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_paired_differences_stand_beside_the_scores(nothing):
    gains = {"baseline": (nothing,) * 3, "method3": (4.0, 3.5, 4.5), "f1": (2.0, -1.0, 5.0)}
    keys = ("over_baseline", "over_baseline_low", "over_baseline_high")
    rows = [row | dict(zip(keys, gains[row["row"]], strict=True)) for row in ROWS]
    scores, differences = dots(rows, "baseline").axes
    assert [line.get_xdata()[0] for line in scores.lines if len(line.get_xdata()) == 1] == [10.0, 14.0, 12.0]
    drawn = [(*line.get_xdata(), *line.get_ydata()) for line in differences.lines if len(line.get_xdata()) == 1]
    assert drawn == [(4.0, 1), (2.0, 2)]
    spans = [bar.get_segments()[0][:, 0].tolist() for bar in differences.collections]
    assert spans == [[3.5, 4.5], [-1.0, 5.0]]
    assert [list(line.get_xdata()) for line in differences.lines if len(line.get_xdata()) == 2] == [[0, 0]]
    assert len(dots(rows, "f1").axes) == len(dots(ROWS, "baseline").axes) == 1


def test_curves_have_a_panel_per_title_and_rise_in_x():
    figure = curves({"noise": {"fusion": CURVE, "infrared": CURVE}, "dead_pixels": {"fusion": CURVE}}, "severity")
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title(loc="left") for axis in drawn] == ["noise", "dead pixels"]
    assert len(drawn[0].lines) == 2
    assert list(drawn[0].lines[0].get_xdata()) == [0, 3, 5] and list(drawn[0].lines[0].get_ydata()) == [12, 9, 6]
    assert png(figure).startswith(b"\x89PNG")


def test_curves_that_coincide_are_both_seen_and_controls_are_dashed():
    figure = curves({"noise": {"prototype": CURVE, "infrared": CURVE, "fusion": CURVE}}, "severity")
    control, below, above = figure.axes[0].lines
    assert below.get_linewidth() > above.get_linewidth() and below.get_zorder() <= above.get_zorder()
    assert [line.get_linestyle() for line in (control, below, above)] == ["--", "-", "-"]


def test_four_panels_leave_two_places_empty():
    figure = curves({name: {"fusion": CURVE} for name in "abcd"}, "share")
    assert [axis.axison for axis in figure.axes] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("draw", [lambda: dots([]), lambda: curves({}, "x")])
def test_nothing_to_draw_says_what_to_do(draw):
    with pytest.raises(UsageError, match="run the study first"):
        draw()
