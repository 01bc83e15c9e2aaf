"""The table of fused pictures against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from models.fusers.metrics import METRICS
from tasks.tabulate_metrics import GOALS, FusedRow, metrics_markdown, tabulate_metrics

ROWS = (FusedRow("dull", "a control", True), FusedRow("bright", "another", True), FusedRow("learnt", "ours"))


def pictures(**values) -> pd.DataFrame:
    """Four frames; every metric is 0.5 unless given."""
    return pd.DataFrame({"id": list("abcd"), **dict.fromkeys(METRICS, 0.5), **values})


@pytest.fixture
def table():
    made = {
        "dull": pictures(Qabf=[0.1, 0.2, 0.3, 0.4], VIF=0.9),
        "bright": pictures(Qabf=[0.2, 0.4, 0.6, 0.8], VIF=0.1),
        "learnt": pictures(Qabf=[0.3, 0.5, 0.7, 0.9], VIF=[0.7, 0.8, 0.9, 1.0])[::-1],
    }
    return tabulate_metrics(made, ROWS, resamples=500).set_index("row")


def test_means_and_the_gain_over_the_control_that_is_best_in_each(table):
    assert table.loc["learnt", "Qabf"] == 0.6 and table.loc["bright", "Qabf"] == 0.5
    assert table["pictures"].tolist() == [4, 4, 4]
    assert table.loc["learnt", "over_Qabf"] == pytest.approx(0.1), "over bright"
    assert table.loc["learnt", "over_VIF"] == pytest.approx(0.85 - 0.9), "over dull"


def test_frames_are_paired_whatever_their_order(table):
    learnt = table.loc["learnt"]
    assert learnt["over_Qabf_low"] == learnt["over_Qabf_high"] == pytest.approx(0.1), "the same gain on every frame"
    assert learnt["over_VIF_low"] < learnt["over_VIF"] < learnt["over_VIF_high"]
    assert learnt["Qabf_low"] < 0.6 < learnt["Qabf_high"]


def test_a_control_gains_over_nothing(table):
    for goal in GOALS:
        assert table.loc[["dull", "bright"], f"over_{goal}"].isna().all()
    alone = tabulate_metrics({"learnt": pictures()}, ROWS[2:], resamples=10)
    assert alone["over_SCD"].isna().all() and np.isfinite(alone["SCD"]).all()


def test_the_text_has_a_line_per_row(table):
    lines = metrics_markdown(table.reset_index()).splitlines()
    assert len(lines) == 5 and lines[0].startswith("| row | EN | SD |")
    assert lines[4].endswith("| ours |") and "| +0.100 [+0.100, +0.100] |" in lines[4]
    assert lines[2].count("| – ") == len(GOALS)
