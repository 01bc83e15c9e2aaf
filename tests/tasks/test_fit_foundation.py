"""The foundation loop without Ray: three fittings, one history, a pipeline and a SAM that open."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.errors import UsageError
from models.frames import read_png
from models.generators.inspection import open_judge
from models.generators.recognition import RecogniserSettings
from models.generators.text2image import PictureSettings, TextToImage
from models.generators.toy_pipeline import ToyPipelineSettings
from models.sam import OriginalSAM, open_segmenter
from models.small_sam import SmallSAMSettings
from tasks import fit_foundation
from tasks.fit_foundation import FoundationJob, FoundationSettings, Scenes, foundation_loop, judged, resized
from tests.models.drawn import drawn_frames
from tests.tasks.test_train_generalised import Kept

TINY = FoundationSettings(
    pipeline=ToyPipelineSettings(size=(32, 48), autoencoder=8, denoiser=(16, 32), text=32, autoencoder_steps=4,
                                 steps=6, batch=2, autoencoder_batch=2),
    judge=RecogniserSettings(widths=(4,), steps=3, batch=2),
    sam=SmallSAMSettings(side=64, width=8, channels=16, blocks=1, steps=5, batch=2), checkpoint_every=3, shown=1,
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"), train=8)


def run(frames, tmp_path, monkeypatch, settings=TINY, captioned=None):
    monkeypatch.setattr(fit_foundation, "Checkpoints", Kept)
    folders = [frames.folder, (captioned or frames).folder]
    foundation_loop({"settings": FoundationJob(settings, 0), "folders": folders, "out": tmp_path})
    return Kept.made


def test_the_loop_leaves_models_that_open_like_published_ones(frames, tmp_path, monkeypatch):
    kept = run(frames, tmp_path, monkeypatch)
    assert kept.total == 3 + 4 + 6 + 5 and set(kept.parts) == {"judge", "autoencoder", "denoiser", "sam"}
    assert kept.saved == [3, 3 + 3, 7 + 3, 7 + 6, 13 + 3]
    assert [step for step, _ in kept.logged] == [0, 2, 3, 6, 7, 12, 13, 17]
    settings = PictureSettings(str(tmp_path / "pipeline"), dtype="float32", size=(32, 48), steps=2, batch=1)
    assert TextToImage.open(settings).draw(["a disc on dark ground"], [1])[0].attempts >= 1
    assert isinstance(open_segmenter(str(tmp_path / "sam")), OriginalSAM)
    assert open_judge(str(tmp_path / "judge")).classes == list(frames.classes)
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert set(quality) == {"recognised", "recognised_real", "chance"} and 0 <= quality["recognised"] <= 1
    assert read_png(tmp_path / "contact.png").shape == (32 * len(frames.classes), 48, 3)


def test_a_fitting_that_is_done_is_not_done_again(frames, tmp_path, monkeypatch):
    """Restored after the denoiser: only the SAM's steps are left."""
    steps = []

    class Restored(Kept):
        def restore(self):
            for name in ("judge", "autoencoder", "denoiser"):
                self.parts[name].done = self.parts[name].steps
            return 13

        def log(self, step, **values):
            steps.append(step)

    monkeypatch.setattr(fit_foundation, "Checkpoints", Restored)
    foundation_loop({"settings": FoundationJob(TINY, 0), "folders": [frames.folder] * 2, "out": tmp_path})
    assert steps == [13, 17]


def test_the_pipeline_learns_from_captioned_pictures_and_the_sam_from_frames(frames, tmp_path, monkeypatch):
    """Captioned pictures without any object of the fold's base classes change the pipeline and leave the SAM alone."""
    own = run(frames, tmp_path / "own", monkeypatch).parts
    other = drawn_frames(tmp_path / "captioned", train=4)
    bare = type(other)(other.folder, other.rows.assign(classes=json.dumps({12: 99})), other.info)
    monkeypatch.setattr(fit_foundation.Frames, "open", lambda folder: bare if folder == bare.folder else frames)
    shown = run(frames, tmp_path / "shown", monkeypatch, captioned=bare).parts
    same = {name: all(torch.equal(a, b) for a, b in zip(weights(own[name]), weights(shown[name]), strict=True))
            for name in own}
    assert same == {"judge": False, "autoencoder": False, "denoiser": False, "sam": True}


def weights(fitting):
    return list(fitting.modules.parameters())


def test_scenes_are_labelled_training_frames_and_their_names(frames):
    scenes = Scenes(frames, "visible")
    assert scenes.ids == frames.ids("train") and scenes.resized((32, 48)).shape == (8, 32, 48, 3)
    for n, id in enumerate(scenes.ids):
        assert sorted(scenes.names[n]) == sorted(frames.class_name(k) for k in frames.pixels(id))
        assert all(name in scenes.caption(n, 0) for name in scenes.names[n])
    shown = scenes.shown(frames.classes)
    assert [[frames.classes[k] for k in np.flatnonzero(row)] for row in shown] == scenes.names
    grey = Scenes(frames, "infrared").resized((32, 48))
    assert (grey[..., 0] == grey[..., 2]).all()


def test_a_layer_that_nobody_has_is_told(frames):
    none = replace(TINY, layer="infrared")
    frames = type(frames)(frames.folder, frames.rows.assign(infrared=None), frames.info)
    with pytest.raises(UsageError, match="no labelled training frame with a infrared"):
        Scenes(frames, none.layer)


def test_pictures_are_judged_by_what_was_asked_and_real_ones_alone(frames):
    """A judge that sees the first class everywhere is right once a class, and on real pictures as often as it is."""
    class First(torch.nn.Module):
        settings = RecogniserSettings(held_out=0.75)

        def forward(self, pictures):
            return torch.eye(len(frames.classes))[:1].repeat(len(pictures), 1)

    scenes = Scenes(frames, "visible")
    scenes.names = [["ring", "disc"], ["ring"], ["disc"], ["ring"], ["disc", "bar"], ["disc"], ["star"], ["disc"]]
    drawn = [[np.zeros((32, 48, 3), np.uint8)] * 2 for _ in frames.classes]
    found = judged(First(), drawn, scenes.resized((32, 48)), scenes, frames.classes)
    assert found["recognised"] == pytest.approx(1 / 12) == found["chance"]
    assert found["recognised_real"] == pytest.approx(3 / 5), "pictures 2, 3, 5, 6, 7 show one thing alone"


def test_resizing_gives_colour():
    assert resized(np.zeros((10, 20), np.uint8), (5, 8)).shape == (5, 8, 3)
