"""Greedy selection: the five invariants of the spec, against the loop written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.distinct import COPY, calibrate_threshold, choose_distinct, coverage

QUICK = settings(max_examples=30)
SEEDS = st.integers(0, 10_000)


def clustered(count, seed=0, dimensions=16, clusters=12, spread=0.5):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dimensions))
    rows = centres[rng.integers(clusters, size=count)] + spread * rng.normal(size=(count, dimensions))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def plain(rows, threshold):
    bank, accepted = [], []
    for row in rows.astype(np.float64):
        accepted.append(max((float(row @ u) for u in bank), default=-1.0) < threshold)
        if accepted[-1]:
            bank.append(row)
    return np.array(accepted)


@QUICK
@given(SEEDS, st.sampled_from([0.3, 0.6, 0.8, 0.95]), st.integers(1, 50))
def test_any_block_gives_what_the_loop_gives(seed, threshold, block):
    rows = clustered(120, seed)
    found = choose_distinct(rows, threshold, block=block)
    assert (found.accepted == plain(rows, threshold)).all()
    assert np.array_equal(found.bank, rows[found.accepted])


@QUICK
@given(SEEDS, st.sampled_from([0.5, 0.8]))
def test_accepted_rows_are_apart_and_rejected_ones_have_an_earlier_neighbour(seed, threshold):
    rows = clustered(150, seed)
    found = choose_distinct(rows, threshold, block=32)
    cosines = found.bank @ found.bank.T - 2 * np.eye(len(found.bank))
    assert cosines.max() < threshold
    places = np.flatnonzero(found.accepted)
    for i in np.flatnonzero(~found.accepted):
        neighbour = places[found.nearest[i]]
        assert neighbour < i and rows[neighbour] @ rows[i] >= threshold - 1e-6
        assert found.similarity[i] == pytest.approx(rows[neighbour] @ rows[i], abs=1e-5)


@QUICK
@given(SEEDS, st.integers(0, 120))
def test_a_split_run_is_one_run_and_a_prefix_is_a_restriction(seed, cut):
    rows = clustered(120, seed)
    whole = choose_distinct(rows, 0.7, block=16)
    first = choose_distinct(rows[:cut], 0.7, block=50)
    second = choose_distinct(rows[cut:], 0.7, first.bank, block=7)
    assert (np.concatenate([first.accepted, second.accepted]) == whole.accepted).all()
    assert np.array_equal(np.concatenate([first.nearest, second.nearest]), whole.nearest)
    assert np.array_equal(second.bank, whole.bank)


def test_the_first_row_is_always_accepted_and_a_copy_never():
    row = clustered(1)
    found = choose_distinct(np.concatenate([row, row, -row]), 0.999)
    assert found.accepted.tolist() == [True, False, True]
    assert found.similarity[0] == -1 and found.nearest.tolist() == [-1, 0, 0]


def test_a_full_bank_ends_the_walk_at_the_row_that_filled_it():
    rows = clustered(200)
    whole = choose_distinct(rows, 0.8)
    for block in (5, 64, 500):
        found = choose_distinct(rows, 0.8, block=block, most=9)
        last = np.flatnonzero(whole.accepted)[8]
        assert len(found.bank) == 9 and len(found.accepted) == last + 1
        assert (found.accepted == whole.accepted[: last + 1]).all()
    assert len(choose_distinct(rows, 0.8, found.bank, most=9).accepted) == 0


def test_no_rows_are_no_trouble():
    found = choose_distinct(np.empty((0, 4), np.float32), 0.5)
    assert len(found.accepted) == 0 and found.bank.shape == (0, 4)


def test_a_cosine_at_the_threshold_is_too_near_whatever_the_block():
    """float32 products of the two sizes differ in the last bit; float64 decides."""
    rows = clustered(64, 3, dimensions=96)
    threshold = float(np.dot(rows[0].astype(np.float64), rows[1].astype(np.float64)))
    for block in (1, 2, 64):
        assert choose_distinct(rows[:2], threshold, block=block).accepted.tolist() == [True, False]
        assert choose_distinct(rows[:2], threshold + 1e-9, block=block).accepted.tolist() == [True, True]


@pytest.mark.parametrize("acceptance", [0.2, 0.4, 0.7])
def test_the_calibrated_threshold_accepts_the_share_asked_for(acceptance):
    rows = clustered(256, spread=1.0)
    found = choose_distinct(rows, calibrate_threshold(rows, acceptance)).accepted.mean()
    assert acceptance <= found < acceptance + 0.06


def test_of_rows_that_are_all_alike_one_is_accepted():
    rows = np.repeat(clustered(1), 10, axis=0)
    assert calibrate_threshold(rows) == calibrate_threshold(rows[:1]) == COPY
    assert choose_distinct(rows, COPY).accepted.sum() == 1


def test_coverage_counts_what_is_different():
    assert coverage(np.eye(5, dtype=np.float32))["effective"] == pytest.approx(5)
    copies = coverage(np.repeat(clustered(1), 4, axis=0))
    assert copies["effective"] == pytest.approx(1, abs=1e-3) and copies["nearest"] == pytest.approx(1, abs=1e-5)
