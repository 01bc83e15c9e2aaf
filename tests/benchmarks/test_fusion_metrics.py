"""All fusion metrics of a batch against a per-image numpy reference: at least five times as fast, equal values."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from models.fusers.metrics import METRICS, fusion_metrics
from tests.models.fusers.reference_metrics import REFERENCE

pytestmark = pytest.mark.bench
ROUNDS = 3


def scenes(batch: int, size: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = gaussian_filter(rng.normal(size=(2, batch, *size)), (0, 0, 2, 2)) * 350 + 110
    return [x.clip(0, 255).round().astype(np.uint8) for x in (a, b, 0.6 * a + 0.5 * b)]


def reference(trios: list[np.ndarray]) -> dict[str, np.ndarray]:
    floats = [x.astype(np.float64) for x in trios]
    rows = [[REFERENCE[name](*trio) for name in METRICS] for trio in zip(*floats, strict=True)]
    return dict(zip(METRICS, np.array(rows).T, strict=True))


def seconds(function, argument) -> tuple[float, dict]:
    start = time.perf_counter()
    return_value = function(argument)
    return time.perf_counter() - start, return_value


def test_all_metrics_are_at_least_five_times_as_fast(benchmark):
    """The ratio of the fastest of several interleaved rounds; absolute times depend on the machine."""
    trios = scenes(2, (480, 640))
    tensors = [torch.from_numpy(x) for x in trios]
    ours, theirs = [], []
    for _ in range(ROUNDS):
        spent, found = seconds(lambda pictures: fusion_metrics(*pictures), tensors)
        ours.append(spent)
        spent, slow = seconds(reference, trios)
        theirs.append(spent)
    for name in METRICS:
        np.testing.assert_allclose(found[name].numpy(), slow[name], atol=1e-3)
    benchmark.extra_info["ratio"] = ratio = min(theirs) / min(ours)
    benchmark.pedantic(fusion_metrics, args=tensors, rounds=1)
    print(f"\nratio {ratio:.1f} ({min(theirs):.2f} s against {min(ours):.2f} s)")
    assert ratio >= 5
