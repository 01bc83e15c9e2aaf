"""Regions found by thresholds: the right ones, in order, and none that should not be there."""

from __future__ import annotations

import numpy as np
import pytest

from models.fusers.regions import regions

EVERY = {"area": (0.0005, 0.5), "stability": 0.5, "most": 40}


def scene(sign: int) -> tuple[np.ndarray, np.ndarray]:
    """A square that stands out against a ramp, and where it is."""
    where = np.zeros((60, 80), bool)
    where[20:35, 30:50] = True
    ramp = np.broadcast_to(np.linspace(100, 140, 80), where.shape)
    return np.clip(ramp + sign * 90 * where, 0, 255).astype(np.uint8), where


@pytest.mark.parametrize("sign", [1, -1], ids=["bright", "dark"])
def test_what_stands_out_is_the_most_stable(sign):
    grey, where = scene(sign)
    found = regions(grey, **EVERY)
    assert np.array_equal(found[0]["segmentation"], where) and found[0]["stability_score"] > 0.95
    assert found[0]["area"] == where.sum() and found[0]["predicted_iou"] == 1
    scores = [part["stability_score"] for part in found]
    assert scores == sorted(scores, reverse=True)


def test_bounds_are_kept():
    grey, where = scene(1)
    assert len(regions(grey, **{**EVERY, "most": 2})) == 2
    assert not regions(grey, **{**EVERY, "stability": 1.01})
    small = regions(grey, **{**EVERY, "area": (0.0005, 0.01)})
    assert all(part["area"] <= 48 for part in small)
    assert not any(np.array_equal(part["segmentation"], where) for part in small)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_picture_has_none(level):
    assert regions(np.full((20, 30), level, np.uint8), **EVERY) == []


def test_two_bodies_are_two_regions_until_a_bridge_joins_them():
    grey = np.zeros((40, 60), np.uint8)
    grey[10:20, 5:15] = grey[10:20, 40:50] = 200
    apart = regions(grey, **EVERY)
    assert {part["area"] for part in apart if part["stability_score"] > 0.9} == {100}
    grey[14:16, 15:40] = 200
    assert 250 in {part["area"] for part in regions(grey, **EVERY)}
