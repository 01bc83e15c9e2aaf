"""Choosing among 10,000 candidates of 2048 dimensions, against one matrix-vector product per candidate."""

import time

import numpy as np
import pytest

from models.distinct import choose_distinct

pytestmark = pytest.mark.bench
COUNT, DIMENSIONS, CENTRES, THRESHOLD = 10_000, 2048, 2000, 0.8


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, DIMENSIONS), dtype=np.float32)
    drawn = centres[rng.integers(CENTRES, size=COUNT)]
    drawn += 0.3 * rng.standard_normal(drawn.shape, dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def one_by_one(rows, threshold):
    bank, size = np.empty((len(rows), rows.shape[1]), np.float32), 0
    for row in rows:
        if size == 0 or (bank[:size] @ row).max() < threshold:
            bank[size] = row
            size += 1
    return size


def test_blocks_are_faster_than_single_rows(rows, record_property):
    start = time.perf_counter()
    found = choose_distinct(rows, THRESHOLD)
    middle = time.perf_counter()
    expected = one_by_one(rows, THRESHOLD)
    end = time.perf_counter()
    record_property("seconds", round(middle - start, 2))
    print(f"\n{COUNT} x {DIMENSIONS}: {len(found.bank)} kept in {middle - start:.2f} s, loop {end - middle:.2f} s")
    assert len(found.bank) == expected > 1500
    assert middle - start < 0.7 * (end - middle)
