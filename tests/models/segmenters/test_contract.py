"""What holds for every learner of the table: from a model folder to a prediction, trained or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import LEARNERS
from models.backbone import load_encoder, save_encoder
from models.episode import EpisodeKey
from models.errors import UsageError
from models.geometry import Canvas
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.episodes import gather
from models.segmenters.expert import Expert, ExpertSettings, stored_settings
from models.segmenters.lessons import MetaSettings
from models.segmenters.msanet import MSANetSettings
from models.segmenters.predictor import Predictor, load_experts
from models.views import FeatureBank, Stream, Views
from tasks.train_meta import MetaJob, save_model
from tests.models.drawn import ENCODER, drawn_frames

SIZE = (65, 97)
SMALL = ExpertSettings(
    base_width=16, anchored=AnchoredSettings(width=8),
    msanet=MSANetSettings(width=16, similarity_width=4, rates=(1, 2), prior="masked_l3"),
)  # fmt: skip
STREAM = (Stream("infrared", "infrared"),)


class Kept:
    """What selection leaves behind."""

    step, score = {"0": 7}, {"0": 0.5}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"), train=10, test=2)


@pytest.fixture(scope="module", params=sorted(LEARNERS))
def model(request, tmp_path_factory, frames) -> tuple[Path, nn.Module, Expert]:
    """A folder of a 3-shot model of fold 0, the encoder it was made for, and its expert."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b", "c", "encoder", "d", "translators")]
    save_encoder(folders[3], ENCODER)
    settings = replace(SMALL, learner=request.param)
    encoder = load_encoder(folders[3], settings.wants)
    torch.manual_seed(0)
    expert = Expert(encoder.channels, frames.base(0), 1, settings, encoder.blocks, shots=3)
    meta = MetaSettings(size=SIZE, expert=settings, streams=STREAM, shots=3, letterbox="exact")
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, nn.ModuleDict({"0": expert}), frames, MetaJob(meta, (0,), "thermal"), folders, Kept())
    return folder, encoder, expert


def shown(frames, count=4):
    """Frames that hold the same class, and that class."""
    for label in range(1, 13):
        ids = [id for id in frames.ids() if frames.pixels(id).get(label, 0) > 60]
        if len(ids) >= count:
            return ids[:count], label
    raise AssertionError("the drawn frames show no class often enough")


def batch_of(model, frames):
    ids, label = shown(frames)
    bank = FeatureBank(model[1], Views(frames), Canvas(SIZE))
    return gather(bank, [EpisodeKey(0, label, ids[0], tuple(ids[1:]), 0)], ["infrared"])


def test_it_answers_on_the_grid_and_learns(model, frames):
    expert, batch = model[2], batch_of(model, frames)
    out = expert.train()(batch.query, batch.support, batch.masks)
    assert out.final.shape == (1, 2, 9, 13) and out.streams.shape == out.control.shape == (1, 1, 2, 9, 13)
    assert out.psi.shape == (1, 1) and 0 <= out.psi.min() <= out.psi.max() <= 1
    assert not out.control.requires_grad
    out.final.sum().backward()
    assert all(p.grad is not None for p in expert.ensemble.parameters())
    assert all(p.grad is None for p in expert.base.parameters())
    expert.zero_grad(set_to_none=True)


def test_its_folder_says_all_that_a_prediction_needs(model, frames):
    config, encoder, experts = load_experts(model[0])
    batch = batch_of(model, frames)
    assert encoder.wants == model[1].wants and config["shots"] == 3 and config["letterbox"] == "exact"
    assert config["select_on"].startswith("held_out: base classes")
    again = experts[0](batch.query, batch.support, batch.masks)
    expected = model[2].eval()(batch.query, batch.support, batch.masks)
    assert torch.equal(again.final, expected.final) and torch.equal(again.streams, expected.streams)


@pytest.mark.parametrize("shots", [1, 3])
def test_the_predictor_takes_any_number_of_supports_in_any_order(model, frames, shots):
    ids, label = shown(frames)
    pictures = [frames.infrared(id) for id in ids[1 : 1 + shots]]
    masks = [(frames.label(id) == label).astype(np.uint8) for id in ids[1 : 1 + shots]]
    predictor = Predictor(model[0])
    mask, share = predictor.predict(frames.infrared(ids[0]), pictures, masks)
    assert mask.shape == share.shape == (64, 96) and np.isfinite(share).all()
    turned = predictor.predict(frames.infrared(ids[0]), pictures[::-1], masks[::-1])[1]
    assert np.allclose(turned, share, atol=1e-4)
    bank = FeatureBank(model[1], Views(frames), Canvas(SIZE))
    truth = gather(bank, [EpisodeKey(0, label, ids[0], tuple(ids[1 : 1 + shots]), 0)], ["infrared"])
    final = model[2].eval()(truth.query, truth.support, truth.masks).final.softmax(1)[:, 1:]
    assert np.allclose(Canvas(SIZE).restore(final, 64, 96)[0, 0].detach().numpy(), share, atol=5e-3)


def test_an_unknown_learner_lists_the_known_ones():
    with pytest.raises(UsageError, match="no 'msa'; choose one of anchored, msanet"):
        ExpertSettings(learner="msa")


def test_settings_come_back_from_a_config():
    from dataclasses import asdict
    from json import dumps, loads

    settings = replace(SMALL, learner="msanet", fusion="F1")
    assert stored_settings(loads(dumps(asdict(settings)))) == settings
    first = {"base_width": 16, "learner": {**asdict(AnchoredSettings(width=8))}, "fusion": "F2", "gamma": 0.05}
    assert stored_settings(loads(dumps(first))) == ExpertSettings(base_width=16, anchored=AnchoredSettings(width=8))
