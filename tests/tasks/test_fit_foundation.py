"""The foundation loop without Ray: three fittings, one history, a pipeline and a SAM that open."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.errors import UsageError
from models.frames import read_png
from models.generators.text2image import PictureSettings, TextToImage
from models.generators.toy_pipeline import ToyPipelineSettings
from models.sam import OriginalSAM, open_segmenter
from models.small_sam import SmallSAMSettings
from tasks import fit_foundation
from tasks.fit_foundation import FoundationJob, FoundationSettings, Scenes, foundation_loop, resized
from tests.models.drawn import drawn_frames
from tests.tasks.test_train_generalised import Kept

TINY = FoundationSettings(
    pipeline=ToyPipelineSettings(size=(32, 48), autoencoder=8, denoiser=(16, 32), text=32, autoencoder_steps=4,
                                 steps=6, batch=2, autoencoder_batch=2),
    sam=SmallSAMSettings(side=64, width=8, channels=16, blocks=1, steps=5, batch=2), checkpoint_every=3, shown=1,
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"), train=8)


def run(frames, tmp_path, monkeypatch, settings=TINY):
    monkeypatch.setattr(fit_foundation, "Checkpoints", Kept)
    foundation_loop({"settings": FoundationJob(settings, 0), "folders": [frames.folder], "out": tmp_path})
    return Kept.made


def test_the_loop_leaves_models_that_open_like_published_ones(frames, tmp_path, monkeypatch):
    kept = run(frames, tmp_path, monkeypatch)
    assert kept.total == 4 + 6 + 5 and set(kept.parts) == {"autoencoder", "denoiser", "sam"}
    assert kept.saved == [3, 4 + 3, 4 + 6, 10 + 3]
    assert [step for step, _ in kept.logged] == [0, 3, 4, 9, 10, 14]
    settings = PictureSettings(str(tmp_path / "pipeline"), dtype="float32", size=(32, 48), steps=2, batch=1)
    assert TextToImage.open(settings).draw(["a disc on dark ground"], [1])[0].attempts >= 1
    assert isinstance(open_segmenter(str(tmp_path / "sam")), OriginalSAM)
    assert read_png(tmp_path / "contact.png").shape == (32 * len(frames.classes), 48, 3)


def test_a_fitting_that_is_done_is_not_done_again(frames, tmp_path, monkeypatch):
    """Restored after the denoiser: only the SAM's steps are left."""
    steps = []

    class Restored(Kept):
        def restore(self):
            for name in ("autoencoder", "denoiser"):
                self.parts[name].done = self.parts[name].steps
            return 10

        def log(self, step, **values):
            steps.append(step)

    monkeypatch.setattr(fit_foundation, "Checkpoints", Restored)
    foundation_loop({"settings": FoundationJob(TINY, 0), "folders": [frames.folder], "out": tmp_path})
    assert steps == [10, 14]


def test_scenes_are_labelled_training_frames_and_their_names(frames):
    scenes = Scenes(frames, "visible", (32, 48))
    assert scenes.ids == frames.ids("train") and scenes.pictures.shape == (8, 32, 48, 3)
    for n, id in enumerate(scenes.ids):
        assert sorted(scenes.names[n]) == sorted(frames.class_name(k) for k in frames.pixels(id))
        assert all(name in scenes.caption(n, 0) for name in scenes.names[n])
    grey = Scenes(frames, "infrared", (32, 48)).pictures
    assert (grey[..., 0] == grey[..., 2]).all()


def test_a_layer_that_nobody_has_is_told(frames):
    none = replace(TINY, layer="infrared")
    frames = type(frames)(frames.folder, frames.rows.assign(infrared=None), frames.info)
    with pytest.raises(UsageError, match="no labelled training frame with a infrared"):
        Scenes(frames, none.layer, (32, 48))


def test_resizing_gives_colour():
    assert resized(np.zeros((10, 20), np.uint8), (5, 8)).shape == (5, 8, 3)
