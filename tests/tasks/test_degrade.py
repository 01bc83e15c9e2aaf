"""Degraded frames: the test split alone, the infrared picture alone, and the same bytes each time."""

from __future__ import annotations

import numpy as np
import pytest

from models.frames import Frames, read_png
from tasks.degrade import LAYERS, Degrade, _test_rows
from tests.models.drawn import drawn_frames


class Folder:
    def __init__(self, path):
        self.path = path

    def write(self, name, data):
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(data)


@pytest.fixture
def frames(tmp_path):
    (tmp_path / "frames").mkdir()
    return drawn_frames(tmp_path / "frames", train=4, test=3)


def spoil(frames: Frames, folder, rows, severity=3, seed=0):
    worker = Degrade({"corruption": "noise", "severity": severity, "seed": seed}, [frames.folder])
    return worker(rows, Folder(folder))


def rows_of(frames):
    return [{"id": id, "row": row} for id, row in _test_rows(frames.rows)]


def test_only_the_infrared_of_the_test_split_changes(frames, tmp_path):
    made = spoil(frames, tmp_path / "out", rows_of(frames))
    assert [row["id"] for row in made] == frames.ids("test")
    for row in made:
        before, after = ({layer: read_png(folder / row[layer]) for layer in LAYERS}
                         for folder in (frames.folder, tmp_path / "out"))  # fmt: skip
        assert (before["label"] == after["label"]).all() and (before["visible"] == after["visible"]).all()
        change = np.abs(before["infrared"].astype(int) - after["infrared"])
        assert 5 < change.mean() < 25


def test_a_frame_is_spoilt_the_same_whatever_its_neighbours(frames, tmp_path):
    rows = rows_of(frames)
    spoil(frames, tmp_path / "all", rows)
    spoil(frames, tmp_path / "one", rows[1:2])
    name = rows[1]["row"]["infrared"]
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    spoil(frames, tmp_path / "other", rows[1:2], seed=1)
    assert (tmp_path / "all" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_a_frame_without_a_visible_picture_is_fine(frames, tmp_path):
    table = frames.rows.copy()
    table["visible"] = None
    made = spoil(frames, tmp_path / "out", [{"id": id, "row": row} for id, row in _test_rows(table)])
    assert all(row["visible"] is None for row in made)
    assert not list((tmp_path / "out" / "images").glob("*.visible.png"))
