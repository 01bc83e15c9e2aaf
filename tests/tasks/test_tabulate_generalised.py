"""The table of steps against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from models.generalised_metrics import harmonic
from tasks.compare_generalised import Course
from tasks.tabulate_generalised import markdown, step_scores, tabulate_generalised

STEPS = (Course("supports", "K supports"), Course("hdig", "pictures", "grammar", "predict"),
         Course("sabr", "outlines", "grammar", "sabr"), Course("real", "ceiling", truth=True))
NOVEL = {"supports": (0.1, 0.2), "hdig": (0.2, 0.3), "sabr": (0.3, 0.2), "real": (0.5, 0.6)}  # by seed


def scores(seeds=(0, 1)):
    rows = []
    for step, values in NOVEL.items():
        for seed in seeds:
            base, novel = 0.6, values[seed]
            found = {"base": base, "novel": novel, "harmonic": harmonic(base, novel), "mean": (base + novel) / 2}
            rows += [{"step": step, "seed": seed, "fold": 0, "protocol": protocol, "metric": name, "label": None,
                      "value": value / (1 if protocol == "diam" else 2)}
                     for name, value in found.items() for protocol in ("diam", "capl")]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table():
    return tabulate_generalised(scores(), STEPS).set_index("row")


def test_means_over_seeds_in_points(table):
    assert table["novel"].tolist() == [15.0, 25.0, 25.0, 55.0] and table["base"].tolist() == [60.0] * 4
    assert table["harmonic"]["hdig"] == round(100 * harmonic(0.6, 0.25), 2)
    assert table["runs"].tolist() == [2] * 4


def test_gains_are_paired_by_seed(table):
    assert table["over_supports"].tolist()[1:] == [10.0, 10.0, 40.0] and pd.isna(table["over_supports"]["supports"])
    assert table["over_supports_low"]["hdig"] == table["over_supports_high"]["hdig"] == 10.0, "equal on every seed"
    assert table["over_previous"]["sabr"] == 0.0 and table["over_previous_low"]["sabr"] < -50
    assert pd.isna(table["over_previous"]["real"]), "the ceiling adds to nothing"


def test_the_gap_is_closed_between_supports_and_real_masks(table):
    assert table["closed"].tolist() == [0.0, 25.0, 25.0, 100.0]
    without = tabulate_generalised(scores(), STEPS[:3])
    assert without["closed"].isna().all()


def test_no_step_builds_on_a_control():
    """The second of three is one: the third adds to the first, and the control to nothing."""
    marked = tabulate_generalised(scores(), (STEPS[0], replace(STEPS[1], control=True), *STEPS[2:])).set_index("row")
    assert marked["over_previous"]["sabr"] == 10.0 == marked["over_supports"]["sabr"]
    assert pd.isna(marked["over_previous"]["hdig"]) and marked["over_supports"]["hdig"] == 10.0


def test_one_seed_has_no_interval():
    alone = tabulate_generalised(scores(seeds=(0,)), STEPS)
    ends = [column for column in alone if column.endswith(("_low", "_high"))]
    assert alone[ends].isna().all(axis=None) and alone["novel"].tolist() == [10.0, 20.0, 30.0, 50.0]
    assert "| 10.0 |" in markdown(alone.to_dict("records"))


def test_the_text_has_a_line_per_step(table):
    lines = markdown(table.reset_index().to_dict("records")).splitlines()
    assert lines[0].startswith("| row | base mIoU (diam) | novel mIoU (diam) | harmonic mIoU (diam) | novel over ")
    assert lines[3].startswith("| hdig | 60.0 [60.0, 60.0] | 25.0 [") and lines[3].endswith("| 25 % | pictures |")
    assert "| +10.0 [+10.0, +10.0] |" in lines[3] and "| – | – | 0 % |" in lines[2] and len(lines) == 6


def test_an_outcome_holds_every_convention():
    found = step_scores(scores(), STEPS)
    assert found["protocol"] == "diam" and [row["row"] for row in found["rows"]] == list(NOVEL)
    capl = [row for row in found["conventions"] if row["protocol"] == "capl" and row["metric"] == "novel"]
    assert [row["step"] for row in capl] == list(NOVEL) and capl[0]["value"] == pytest.approx(0.075)
