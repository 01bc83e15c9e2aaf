"""Supports and queries of prepared frames."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from tasks import places
from tasks.shots import ShotSettings, choose_queries, choose_supports


@pytest.fixture
def frames(thermofuse_home):
    facts = {"infrared": "x", "visible": None, "label": "y", "height": 8, "width": 8, "sha256": ""}
    rows = [{"id": f"{split}{n}", "split": split, "classes": json.dumps({1 + n % 2: 40, 3: 20})} | facts
            for split in ("train", "test") for n in range(6)]
    info = {"dataset": "drawn", "classes": ["a", "b", "c"], "palette": [], "folds": [["a", "b"], ["c"]], "ignored": []}
    return places.store().draft("frames", "a" * 16).commit(pd.DataFrame(rows), info)


def test_supports_of_the_training_set_leave_all_queries(frames):
    settings = ShotSettings(shots=2, min_pixels=30)
    found = choose_supports(frames, settings, 0, 5)
    assert set(found) == {1, 2} and all(id.startswith("train") for ids in found.values() for id in ids)
    assert choose_queries(frames, found) == [f"test{n}" for n in range(6)]


def test_supports_of_the_test_set_are_no_queries(frames):
    found = choose_supports(frames, ShotSettings(shots=1, min_pixels=30, split="test"), 0, 5)
    queries = choose_queries(frames, found)
    assert len(queries) == 4 and not set(queries) & {id for ids in found.values() for id in ids}
