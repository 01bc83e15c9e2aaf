"""Fusers learn from training pairs alone, resume exactly, and never see a novel class."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from models.errors import UsageError
from models.frames import Frames, png_bytes
from models.fusers.base import load_fuser
from models.fusers.settings import FuserSettings, MaskSettings
from models.views import Views
from tasks import fit_fuser as stage
from tasks import places
from tasks.fanout import Compute
from tests.models.drawn import drawn_frames
from tests.models.fusers.small import SMALL
from tests.tasks.test_fit_translators import Interrupted, Reports, commit_frames

BRIEF = {"crop": 32, "batch": 2, "iterations": 4, "checkpoint_every": 2}
SEGMIF = FuserSettings(
    "segmif", {k: v for k, v in SMALL["segmif"].items() if k != "classes"}, rate_fusion=1e-3, **BRIEF
)
SGDFUSE = FuserSettings("sgdfuse", SMALL["sgdfuse"], rate=1e-3, first_share=0.5, **BRIEF)
both = pytest.mark.parametrize("settings", [SEGMIF, SGDFUSE], ids=lambda s: s.fuser)


@pytest.fixture
def frames(thermofuse_home):
    return commit_frames(size=(40, 48))


def run_loop(frames, settings, folder, monkeypatch, fail_after=None, folds=()):
    """The loop alone, in this process, with one interruption when asked; returns the folder of the result."""
    reports = Reports(folder, monkeypatch)
    job = stage.FuserJob(settings, folds)
    config = {"settings": job, "folders": [places.store().local(frames)], "place": str(folder / "place")}
    if fail_after:
        reports.fail_after = fail_after
        with pytest.raises(Interrupted):
            stage.fusion_loop(config)
    stage.fusion_loop(config)
    return folder / str(reports.saved - 1) / "result"


@both
def test_a_restored_run_ends_where_a_straight_one_does(frames, tmp_path, monkeypatch, settings):
    straight = run_loop(frames, settings, tmp_path / "straight", monkeypatch)
    broken = run_loop(frames, settings, tmp_path / "broken", monkeypatch, fail_after=1)
    a, b = (load_fuser(folder).state_dict() for folder in (straight, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    history = [pd.read_parquet(folder / "history.parquet") for folder in (straight, broken)]
    pd.testing.assert_frame_equal(*history)
    other = run_loop(frames, replace(settings, seed=1), tmp_path / "other", monkeypatch)
    c = load_fuser(other).state_dict()
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_the_result_fuses_and_knows_its_classes(frames, tmp_path, monkeypatch):
    fuser = load_fuser(run_loop(frames, SEGMIF, tmp_path, monkeypatch))
    assert fuser.config["classes"] == 2, "one class and background"
    picture = fuser.pictures([np.zeros((40, 48), np.uint8)], [np.zeros((40, 48, 3), np.uint8)])[0]
    assert picture.shape == (40, 48, 3)


@both
def test_only_training_pairs_are_read(frames, settings, monkeypatch):
    opened = Frames.open(places.store().local(frames))
    read, path = set(), opened.path
    monkeypatch.setattr(opened, "path", lambda id, layer: (read.add((opened.split(id), layer)), path(id, layer))[1])
    draw = stage.PairCrops(Views(opened), stage.FuserJob(settings))
    for seed in range(4):
        batch = draw(np.random.default_rng(seed))
    assert batch.infrared.shape == (2, 1, 32, 32) and batch.visible.shape == (2, 3, 32, 32)
    labels = {("train", "label")} if settings.fuser == "segmif" else set()
    assert read == {("train", "infrared"), ("train", "visible")} | labels
    assert (batch.label is None) == (settings.fuser == "sgdfuse") == (batch.mask_infrared is not None)


def test_novel_classes_are_unknown_pixels(frames):
    opened = Frames.open(places.store().local(frames))
    batches = {}
    for folds in ((), (0,)):
        draw = stage.PairCrops(Views(opened), stage.FuserJob(SEGMIF, folds))
        batches[folds] = draw(np.random.default_rng(0))
    assert set(batches[()].label.unique().tolist()) == {0, 1}
    assert set(batches[(0,)].label.unique().tolist()) == {0, 255}
    assert torch.equal(batches[()].infrared, batches[(0,)].infrared)


def test_masks_come_with_the_pairs(frames, tmp_path):
    opened = Frames.open(places.store().local(frames))
    for part, value in (("sam_ir", 255), ("sam_vis", 0)):
        (tmp_path / part).mkdir()
        for id in opened.ids("train"):
            (tmp_path / part / f"{id}.png").write_bytes(_png(value))
    settings = replace(SGDFUSE, masks=MaskSettings("file", folder=str(tmp_path)))
    batch = stage.PairCrops(Views(opened), stage.FuserJob(settings))(np.random.default_rng(0))
    assert (batch.mask_infrared == 1).all() and (batch.mask_visible == 0).all()


def _png(value: int) -> bytes:
    return png_bytes(np.full((40, 48), value, np.uint8))


def test_a_control_is_committed_without_training(frames):
    settings = FuserSettings("maximum")
    ref = stage.fit_fuser(frames, settings, (), Compute())
    assert ref.kind == "fuser" and load_fuser(places.store().local(ref)).name == "maximum"
    assert stage.fit_fuser(frames, settings, (0,), Compute()) == ref
    assert stage.fit_fuser(frames, FuserSettings("average"), (), Compute()) != ref


@pytest.mark.parametrize(("drop", "settings", "words"), [
    (["visible"], SGDFUSE, "no train frames with infrared and visible;"),
    (["label"], SEGMIF, "no train frames with infrared and visible and label"),
])  # fmt: skip
def test_without_pairs_it_says_so(thermofuse_home, drop, settings, words):
    frames = commit_frames(drop=drop)
    with pytest.raises(UsageError, match=words):
        stage.fit_fuser(frames, settings, (), Compute())


def test_where_nothing_visible_is_real_the_translated_serves(thermofuse_home, tmp_path, monkeypatch):
    frames, asked = commit_frames(drop=["visible"], size=(40, 48)), []
    draft = places.store().draft("synthetic", "c" * 16)
    for n in range(2):
        draft.write(f"images/f{n}.rgb.png", png_bytes(np.full((40, 48, 3), 90, np.uint8)))
    synthetic = draft.commit(None, {})
    monkeypatch.setattr(stage, "fit", lambda loop, kind, inputs, job, *_: asked.append((inputs, job)))
    wanted = replace(SGDFUSE, visible="rgb")
    stage.fit_fuser(frames, wanted, (), Compute(), synthetic)
    stage.fit_fuser(commit_frames(size=(40, 48), digest="b" * 16), wanted, (), Compute(), synthetic)
    assert [(len(inputs), job.layer) for inputs, job in asked] == [(2, "rgb"), (1, "visible")]
    views = Views(Frames.open(places.store().local(frames)), places.store().local(synthetic))
    batch = stage.PairCrops(views, asked[0][1])(np.random.default_rng(0))
    assert (batch.visible * 255).round().unique().tolist() == [90]
    with pytest.raises(UsageError, match="no train frames with infrared and lightness;"):
        stage.fit_fuser(frames, replace(SGDFUSE, visible="lightness"), (), Compute(), synthetic)


def test_rare_classes_may_weigh_more(tmp_path):
    """(n_most / n_k)^p of the train frames' pixels; of test frames none counts."""
    opened = drawn_frames(tmp_path, train=6, test=3)
    labels = np.stack([opened.label(id) for id in opened.ids("train")])
    counts = np.array([(labels == k).sum() for k in range(len(opened.classes) + 1)])
    assert counts[0] == counts.max() and len(set(counts)) > 2 and 0 in counts
    expected = np.where(counts > 0, (counts.max() / np.maximum(counts, 1)) ** 0.25, 1.0)
    assert np.allclose(stage.balanced(opened, 0.25), expected, atol=1e-3)
    told = replace(SEGMIF, class_balance=0.25)
    assert np.allclose(stage.build(told, opened).class_weights.numpy(), expected, atol=1e-3)
    assert stage.build(SEGMIF, opened).class_weights is None
    given = (1.0,) * len(counts)
    assert stage.build(replace(told, class_weights=given), opened).class_weights.tolist() == list(given)


def test_frames_of_any_size_weigh_by_their_own_pixels(tmp_path):
    """The first frame is cropped to its left half, the second has lost its label."""
    drawn_frames(tmp_path, train=6, test=3)
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    first, second = rows.index[rows.split == "train"][:2]
    half = Frames.open(tmp_path).label(rows.id[first])[:, :48]
    (tmp_path / rows.label[first]).write_bytes(png_bytes(half))
    found = {int(k): int((half == k).sum()) for k in np.unique(half) if k}
    rows.loc[first, ["width", "classes"]] = [48, json.dumps(found)]
    rows.loc[second, "label"] = None
    rows.to_parquet(tmp_path / "rows.parquet")
    opened = Frames.open(tmp_path)
    shown = [opened.label(id) for id in opened.ids("train") if opened.has(id, "label")]
    counts = np.bincount(np.concatenate([label.ravel() for label in shown]), minlength=len(opened.classes) + 1)
    assert len(shown) == 5 and shown[0].shape == (64, 48)
    expected = np.where(counts > 0, np.sqrt(counts.max() / np.maximum(counts, 1)), 1.0)
    assert np.allclose(stage.balanced(opened, 0.5), expected, atol=1e-4)


def test_arguments_that_a_fuser_does_not_have_are_told(frames):
    opened = Frames.open(places.store().local(frames))
    with pytest.raises(UsageError, match=r"network does not fit segmif.*it takes classes, semantics"):
        stage.build(replace(SEGMIF, network={"colour": "red"}), opened)


def test_relative_mask_folders_lie_under_the_data(monkeypatch, tmp_path):
    monkeypatch.setenv("THERMOFUSE_DATA", str(tmp_path))
    found = stage.found_masks(MaskSettings("file", folder="masks", checkpoint="sam.pth"))
    assert (found.folder, found.checkpoint) == (str(tmp_path / "masks"), str(tmp_path / "sam.pth"))
    assert stage.found_masks(MaskSettings()) == MaskSettings()


def test_weights_are_found_and_digested(monkeypatch, tmp_path):
    monkeypatch.setenv("THERMOFUSE_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "mit.pth"
    file.write_bytes(b"one")
    job = stage.FuserJob(replace(SEGMIF, network={"width": 8, "weights": "mit.pth"}))
    first = stage.with_weights(job)
    assert first.settings.network == {"width": 8, "weights": str(file)}
    file.write_bytes(b"two")
    assert stage.with_weights(job).weights != first.weights
    assert stage.with_weights(stage.FuserJob(SEGMIF)) == stage.FuserJob(SEGMIF)
