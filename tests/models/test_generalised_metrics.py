"""The three conventions on a confusion matrix small enough to do by hand."""

import numpy as np
import pandas as pd
import pytest

from models.errors import UsageError
from models.generalised_metrics import (
    class_ious,
    confusion,
    gap_closed,
    generalised_scores,
    harmonic,
    score_rows,
    summary,
)

# Truth by row: background, base class 1, novel class 2.
MATRIX = np.array([[50, 5, 5], [10, 20, 0], [4, 0, 6]])
BACKGROUND, BASE, NOVEL = 50 / 74, 20 / 35, 6 / 15


def test_the_matrix_counts_pixels_and_passes_ignored_ones_over():
    label = np.array([[0, 1, 1], [2, 255, 0]])
    said = np.array([[0, 1, 2], [2, 1, 1]])
    assert confusion(said, label, 2).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert confusion(said, np.full((2, 3), 255), 2).sum() == 0
    assert confusion(said, label, 2).dtype == np.int64


def test_sizes_and_ids_that_cannot_be_are_told():
    with pytest.raises(ValueError, match="restore the original size"):
        confusion(np.zeros((2, 2)), np.zeros((2, 3)), 2)
    with pytest.raises(ValueError, match="beyond 2"):
        confusion(np.full((2, 2), 3), np.zeros((2, 2)), 2)


def test_an_iou_is_intersection_over_union_of_the_whole_set():
    assert class_ious(MATRIX) == pytest.approx([BACKGROUND, BASE, NOVEL])
    assert np.isnan(class_ious(np.array([[3, 0], [0, 0]]))[1])


@pytest.mark.parametrize("protocol, expected", [
    ("capl", {"base": (BACKGROUND + BASE) / 2, "novel": NOVEL, "total": (BACKGROUND + BASE + NOVEL) / 3}),
    ("diam", {"base": BASE, "novel": NOVEL, "mean": (BASE + NOVEL) / 2}),
    ("bam", {"base": BASE, "novel": NOVEL, "total": (BASE + NOVEL) / 2}),
])
def test_each_convention_by_hand(protocol, expected):
    found = generalised_scores(MATRIX, (1,), (2,), protocol)
    assert found == pytest.approx(expected | {"harmonic": harmonic(expected["base"], expected["novel"])})


def test_total_and_mean_part_ways_when_there_are_more_base_classes():
    matrix = np.diag([10, 10, 10, 0]).copy()
    matrix[3, 0] = 10
    assert generalised_scores(matrix, (1, 2), (3,), "bam")["total"] == pytest.approx(2 / 3)
    assert generalised_scores(matrix, (1, 2), (3,), "diam")["mean"] == pytest.approx(1 / 2)


def test_harmonic_of_nothing_is_nothing():
    assert harmonic(0, 0.7) == harmonic(0.7, 0) == harmonic(0, 0) == 0
    assert harmonic(0.5, 0.5) == 0.5 and np.isnan(harmonic(float("nan"), 0.5))


def test_a_class_that_never_occurs_enters_no_mean():
    matrix = np.zeros((4, 4), np.int64)
    matrix[:3, :3] = MATRIX
    assert generalised_scores(matrix, (1, 3), (2,), "diam")["base"] == pytest.approx(BASE)
    assert np.isnan(generalised_scores(matrix, (1, 2), (3,), "diam")["harmonic"])


def test_every_number_carries_its_protocol():
    rows = score_rows(MATRIX, (1,), (2,), fold=0, seed=3)
    assert set(rows["protocol"]) == {"capl", "diam", "capl+diam"} and set(rows["fold"]) == {0}
    assert list(rows[rows["metric"] == "iou"]["label"]) == [0, 1, 2]
    (base,) = rows[(rows["protocol"] == "capl") & (rows["metric"] == "base")]["value"]
    assert base == pytest.approx((BACKGROUND + BASE) / 2)
    with pytest.raises(UsageError, match="capl, diam, bam"):
        score_rows(MATRIX, (1,), (2,), protocols=("miou",))


def runs(values):
    """Rows of (fold, seed) -> (base, novel), one protocol."""
    rows = []
    for (fold, seed), (base, novel) in values.items():
        found = {"base": base, "novel": novel, "mean": (base + novel) / 2, "harmonic": harmonic(base, novel)}
        rows += [{"protocol": "diam", "metric": k, "label": None, "value": v, "fold": fold, "seed": seed}
                 for k, v in found.items()]
    return pd.DataFrame(rows)


def test_a_summary_averages_seeds_then_folds_and_takes_h_of_the_averages():
    found = summary(runs({(0, 0): (0.6, 0.2), (0, 1): (0.6, 0.4), (1, 0): (0.8, 0.6), (1, 1): (0.8, 0.8)}))
    value = found.set_index("metric")["value"]
    assert value["base"] == pytest.approx(0.7) and value["novel"] == pytest.approx(0.5)
    assert value["harmonic"] == pytest.approx(harmonic(0.7, 0.5))
    folds = np.mean([harmonic(0.6, 0.2), harmonic(0.6, 0.4), harmonic(0.8, 0.6), harmonic(0.8, 0.8)])
    assert value["harmonic_of_folds"] == pytest.approx(folds)
    assert set(found["runs"]) == {4}


def test_a_number_that_one_convention_alone_has_counts_its_own_runs():
    rows = pd.concat([score_rows(MATRIX, (1,), (2,), fold=0, seed=seed) for seed in range(3)])
    found = summary(rows)
    assert set(found["runs"]) == {3} and len(found[found["metric"] == "total"]) == 1
    assert set(found[found["metric"] == "harmonic"]["protocol"]) == {"capl", "diam"}


def test_the_interval_is_students_over_seeds():
    found = summary(runs({(0, seed): (0.5, novel) for seed, novel in enumerate((0.2, 0.3, 0.4))}))
    novel = found.set_index("metric").loc["novel"]
    half = 4.302653 * 0.1 / 3**0.5
    assert novel["low"] == pytest.approx(0.3 - half, abs=1e-5) and novel["high"] == pytest.approx(0.3 + half, abs=1e-5)
    alone = summary(runs({(0, 0): (0.5, 0.5)}))
    assert alone["low"].isna().all() and alone["value"].notna().all()


def test_the_gap_is_closed_from_floor_to_ceiling():
    assert gap_closed(0.2, 0.35, 0.5) == pytest.approx(0.5) and np.isnan(gap_closed(0.5, 0.6, 0.5))
