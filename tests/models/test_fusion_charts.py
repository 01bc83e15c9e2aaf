"""Charts of fused pictures show what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from models.errors import UsageError
from models.fusion_charts import ACCENT, fused_sheet, metric_curves, metric_dots
from models.plots import INK, png


def line(name: str, value: float) -> dict:
    return {"row": name, **{f"{m}{end}": value + more for m in ("A", "B")
                            for end, more in (("", 0), ("_low", -0.1), ("_high", 0.1))}}  # fmt: skip


def test_every_row_has_a_dot_in_every_panel_and_the_best_control_a_rule():
    figure = metric_dots([line("dull", 0.2), line("bright", 0.5), line("learnt", 0.7)], ("A", "B"), ("dull", "bright"))
    assert len(figure.axes) == 2 and [axis.get_title(loc="left") for axis in figure.axes] == ["A", "B"]
    dots = figure.axes[0].containers
    assert [float(dot.lines[0].get_xdata()[0]) for dot in dots] == [0.2, 0.5, 0.7]
    assert [dot.lines[0].get_color() for dot in dots] == [INK, INK, ACCENT]
    rule = figure.axes[0].lines[-1]
    assert set(rule.get_xdata()) == {0.5}
    assert png(figure).startswith(b"\x89PNG")


def test_curves_run_from_left_to_right_between_their_rules():
    points = [(4, 0.5, 0.4, 0.6), (-4, 0.6, 0.5, 0.7), (0, 0.9, 0.8, 1.0)]
    figure = metric_curves({"A": points}, {"A": {"without": 0.3}}, "pixels")
    axis = figure.axes[0]
    assert axis.lines[0].get_xdata().tolist() == [-4, 0, 4] and axis.lines[0].get_ydata().tolist() == [0.6, 0.9, 0.5]
    assert set(axis.lines[1].get_ydata()) == {0.3} and axis.lines[1].get_label() == "without"
    assert png(figure).startswith(b"\x89PNG")


def test_the_sheet_has_a_line_per_scene():
    scene = {"infrared": np.zeros((8, 10), np.uint8), "visible": np.zeros((8, 10, 3), np.uint8)}
    figure = fused_sheet([scene, scene, scene])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["infrared", "visible"] * 3


@pytest.mark.parametrize("draw", [
    lambda: metric_dots([], ("A",), ()), lambda: metric_curves({}, {}, "x"), lambda: fused_sheet([]),
])  # fmt: skip
def test_nothing_to_draw_is_told(draw):
    with pytest.raises(UsageError):
        draw()
