"""An encoder fitted on captions: it learns, no picture of a novel class is read, and it opens like any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.backbone import load_encoder
from models.errors import UsageError
from tasks import pretrain
from tasks.pretrain import PretrainJob, PretrainSettings, lessons, pretrain_loop, seen
from tests.models.drawn import ENCODER, drawn_frames, tiny_encoder
from tests.tasks.test_train_generalised import Kept

FOLD = 0
SETTINGS = PretrainSettings(size=(48, 64), steps=25, batch=8, rate=5e-3, checkpoint_every=10)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"), train=60)


@pytest.fixture(scope="module")
def base(frames):
    return tuple(frames.class_name(k) for k in frames.base(FOLD))


def run(frames, base, folder, monkeypatch, settings=SETTINGS):
    monkeypatch.setattr(pretrain, "Checkpoints", Kept)
    pretrain_loop({"settings": PretrainJob(settings, ENCODER, base), "folders": [frames.folder], "out": folder})
    return Kept.made


def test_it_learns_from_captions_and_opens_like_any_encoder(frames, base, tmp_path, monkeypatch):
    kept = run(frames, base, tmp_path, monkeypatch)
    losses = [values["encoder_loss"] for _, values in kept.logged]
    assert losses[-1] < 0.7 * losses[0] and kept.saved == [10, 20]
    encoder, fresh = load_encoder(tmp_path), tiny_encoder(ENCODER.seed)
    assert encoder.channels == fresh.channels
    images = torch.rand(1, 3, 48, 64)
    assert not torch.allclose(encoder(images).high, fresh(images).high, atol=1e-3)


def test_no_picture_of_a_novel_class_is_read(frames, base, monkeypatch):
    read = []

    def remember(path, read_png=pretrain.read_png):
        read.append(str(path))
        return read_png(path)

    monkeypatch.setattr(pretrain, "read_png", remember)
    pictures, shown = lessons(frames, base, SETTINGS)
    novel = set(frames.novel(FOLD))
    allowed = {str(frames.path(id, "visible")) for id in frames.ids("train") if not novel & set(frames.pixels(id))}
    assert 0 < len(read) == len(pictures) == len(shown) and set(read) <= allowed
    assert shown.any(1).all() and shown.shape[1] == len(base) and pictures.dtype == np.uint8


def test_the_names_are_those_of_the_pictures(frames, base):
    _, shown = lessons(frames, base, SETTINGS)
    named = [{frames.class_name(k) for k in frames.pixels(id)} for id in frames.ids("train")]
    wanted = [names for names in named if names and names <= set(base)]
    assert [{base[k] for k in np.flatnonzero(row)} for row in shown] == wanted


def test_every_level_gets_a_gradient():
    encoder = tiny_encoder()
    encoder.stages.requires_grad_(True)
    found = seen(encoder, torch.randint(0, 256, (2, 48, 64, 3), dtype=torch.uint8))
    assert found.shape == (2, sum(encoder.channels))
    found.sum().backward()
    assert all(p.grad is not None for p in encoder.stages.parameters())


def test_where_every_picture_shows_a_novel_class_it_says_so(frames):
    with pytest.raises(UsageError, match="No visible picture of toy shows base classes alone"):
        lessons(frames, ("nothing",), SETTINGS)
    with pytest.raises(UsageError, match="No infrared picture"):
        lessons(frames, ("nothing",), replace(SETTINGS, layer="infrared"))
