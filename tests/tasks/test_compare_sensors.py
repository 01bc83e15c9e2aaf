"""One network on many pictures: what is trained on what, and counts against masks counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from models.frames import png_bytes
from models.fusers.cascade import Alone, Cascade
from models.metrics import COLUMNS
from tasks import cells, compare_sensors, places
from tasks.compare_sensors import JOINT, Sensor, by_protocol, class_rows
from tasks.compare_sensors import compare_sensors as compare
from tasks.fanout import Compute
from tasks.tabulate import Row, tabulate
from tests.tasks.test_fit_fuser import SEGMIF
from tests.tasks.test_fit_translators import commit_frames

SENSORS = (
    Sensor("infrared", "", SEGMIF, "infrared"), Sensor("visible", "", SEGMIF, "visible"),
    Sensor("pictures", "", SEGMIF, "fused", "maximum"), Sensor("joint", "", SEGMIF, JOINT),
)  # fmt: skip


@pytest.fixture
def frames(thermofuse_home):
    return commit_frames(("train", "train", "test", "test"), size=(40, 48))


@pytest.fixture
def fused(frames):
    draft, rng = places.store().draft("fused", "f" * 16), np.random.default_rng(1)
    for n in range(4):
        draft.write(f"images/f{n}.fused.png", png_bytes(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)))
    return {"maximum": draft.commit(pd.DataFrame({"id": [f"f{n}" for n in range(4)]}), {})}


@pytest.fixture
def here(monkeypatch):
    """Fan-outs run in this process; returns the layers and trainers of the cells that were made."""
    trained = []
    monkeypatch.setattr(cells, "fan_out", lambda worker, rows, settings, *_, **__: worker(settings, [])(rows, None))
    build = compare_sensors.build
    monkeypatch.setattr(
        compare_sensors, "build",
        lambda settings, frames, trainer: trained.append(made := build(settings, frames, trainer)) or made,
    )
    return trained


def test_every_sensor_sits_the_same_test(here, frames, fused):
    table = compare(frames, SENSORS, (5, 6), fused, Compute())
    assert {"seed", "truth", *COLUMNS} <= set(table.columns)
    assert [type(made) for made in here] == [Alone, Alone, Alone, Cascade] * 2
    assert set(table["query"]) == {"f2", "f3"} and set(table["label"]) == {0, 1}
    assert len(table) == len(SENSORS) * 2 * 2 * 2
    rows = [Row(sensor.name, "", sensor.name) for sensor in SENSORS]
    found = tabulate(table, rows, ("infrared",), {0: range(2)}, resamples=20)
    assert found["miou"].between(0, 100).all() and found["episodes"].tolist() == [8] * 4
    assert np.allclose(found.set_index("row")["miou"], by_protocol(table).loc[found["row"], "miou_all"], atol=0.02)
    before = len(here)
    pd.testing.assert_frame_equal(compare(frames, SENSORS, (5, 6), fused, Compute()), table)
    assert len(here) == before, "made once"


def test_a_row_trains_on_its_own_picture(here, frames, fused, monkeypatch):
    seen = []
    monkeypatch.setattr(Alone, "iterate", lambda self, pairs, step: seen.append(pairs) or {"loss": torch.zeros(())})
    compare(frames, SENSORS[:3], (5,), fused, Compute())
    starts = [seen[n * SEGMIF.iterations] for n in range(3)]
    assert [pairs.visible.shape[1] for pairs in starts] == [1, 3, 3]
    assert torch.equal(starts[0].visible, starts[0].infrared)
    assert not torch.equal(starts[1].visible, starts[2].visible)
    assert all(torch.equal(pairs.label, starts[0].label) for pairs in starts), "the same crops for all"
    nets = [made.model.segmentation.state_dict() for made in here]
    assert all(torch.equal(nets[0][name], net[name]) for net in nets for name in nets[0]), "and the same start"


def test_detached_and_joint_are_other_cells(frames, fused):
    apart = Sensor("apart", "", replace(SEGMIF, detach=True), JOINT)
    digests = {compare_sensors._cell(frames, sensor, 5, fused).digest for sensor in (*SENSORS, apart)}
    assert len(digests) == 5
    assert compare_sensors._cell(frames, apart, 6, fused).digest not in digests


def test_counts_are_those_of_the_pixels():
    label = torch.tensor([[[0, 0, 1, 1, 255]]])
    said = torch.tensor([[[0, 1, 1, 0, 1]]])
    rows = class_rows("a", said, label, 3)
    assert [row["truth"] for row in rows] == [2, 2, 0]
    assert [(row["inter_fg"], row["union_fg"], row["inter_bg"], row["union_bg"]) for row in rows] == [
        (1, 3, 1, 3), (1, 3, 1, 3), (0, 0, 4, 4)]  # fmt: skip


def test_protocols_differ_as_they_should():
    rows = class_rows("a", torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 0, 1, 1]]]), 4)
    table = pd.DataFrame(rows).assign(stream="x")
    assert by_protocol(table).loc["x"].tolist() == [50.0, 25.0, 50.0]  # (100, 50, 0), (50, 0), (50)
