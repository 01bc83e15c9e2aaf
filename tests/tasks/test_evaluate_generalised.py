"""The generalised exam on a model that knows everything, and one that knows nothing."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from models.backbone import save_encoder
from models.segmenters.generalised import ClassSpace, Generalised, save_model
from tasks import places
from tasks.evaluate_generalised import Examiner, grade_generalised, sparse, summed
from tests.models.drawn import ENCODER, SIZE, drawn_frames, tiny_encoder

FOLD = 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    for name in ("frames", "encoder", "model"):
        (root / name).mkdir()
    frames = drawn_frames(root / "frames")
    save_encoder(root / "encoder", ENCODER)
    space = ClassSpace(frames.base(FOLD), frames.novel(FOLD))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(root / "model", Generalised(tiny_encoder().channels, space, 16), size=SIZE, layer="visible")
    return [root / name for name in ("frames", "encoder", "model")], frames


class Oracle(Examiner):
    """Says the truth, or with `blind` always background."""

    blind = False

    def logits(self, id):
        index = self.model.space.encode(torch.from_numpy(self.frames.label(id)))
        index = torch.zeros_like(index) if self.blind else index
        return torch.nn.functional.one_hot(index, len(self.model.space.ids)).permute(2, 0, 1)[None].float()


def exam(folders, worker):
    """A Ref of kind "generalised_exam" as the fan-out commits it, and the frames' Ref."""
    inputs, frames = folders
    rows = worker({}, inputs)([{"id": id} for id in frames.ids("test")], None)
    store = places.store()
    info = dict(frames.info)
    return (store.draft("generalised_exam", "a" * 16).commit(pd.DataFrame(rows), {}),
            store.draft("frames", "a" * 16).commit(frames.rows, info))


def value(table, protocol, metric):
    return table[(table["protocol"] == protocol) & (table["metric"] == metric)]["value"].item()


def test_who_says_the_truth_has_every_mark(thermofuse_home, folders):
    table = grade_generalised(*exam(folders, Oracle), FOLD, seed=3)
    for protocol in ("capl", "diam", "bam"):
        assert value(table, protocol, "novel") == value(table, protocol, "harmonic") == 1
    assert set(table["seed"]) == {3} and set(table["fold"]) == {FOLD}
    assert (table[table["metric"] == "iou"]["value"].dropna() == 1).all()


def test_who_says_background_has_only_that(thermofuse_home, folders):
    blind = type("Blind", (Oracle,), {"blind": True})
    table = grade_generalised(*exam(folders, blind), FOLD)
    assert value(table, "diam", "base") == value(table, "diam", "novel") == value(table, "diam", "harmonic") == 0
    assert 0 < value(table, "capl", "base") < 0.2


def test_the_real_model_is_counted_pixel_by_pixel(folders):
    inputs, frames = folders
    examiner = Examiner({}, inputs)
    id = frames.ids("test")[0]
    (row,) = examiner([{"id": id}], None)
    every, single = (summed([row[name]], len(frames.classes)) for name in ("all", "single"))
    assert every.sum() == np.prod(SIZE) and (every.sum(1) == np.bincount(frames.label(id).ravel(), minlength=13)).all()
    shown = set(frames.novel(FOLD)) & set(frames.pixels(id))
    assert (single.sum() > 0) == bool(shown)


def test_one_novel_class_at_a_time_bars_the_others(folders):
    """Truth for one class, the others ignored: the matrix of BAM's convention has no pixel of another novel class in a
    frame that shows several."""
    inputs, frames = folders
    examiner = Oracle({}, inputs)
    for id in frames.ids("test"):
        shown = set(frames.novel(FOLD)) & set(frames.pixels(id))
        single = summed([examiner.count(id)["single"]], len(frames.classes))
        for k in shown:
            assert single[k, k] == single[k].sum() == frames.pixels(id)[k]


def test_matrices_survive_as_text():
    matrix = np.array([[0, 3], [70_000_000_000, 0]])
    assert (summed([sparse(matrix), sparse(matrix)], 1) == 2 * matrix).all() and json.loads(sparse(matrix)) != []
