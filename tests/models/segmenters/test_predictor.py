"""A model folder as one call: the same answers as in the exam, for any size, and clear words for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.backbone import save_encoder
from models.episode import EpisodeKey
from models.errors import UsageError
from models.frames import layer_name, png_bytes
from models.fusers.base import load_fuser
from models.fusers.masks import MaskProvider
from models.fusers.settings import FuserSettings, MaskSettings
from models.generators.thermal import ThermalColour
from models.geometry import Canvas
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.episodes import gather
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.lessons import Best, MetaSettings
from models.segmenters.predictor import Predictor, _seed, load_experts
from models.views import STREAMS, FeatureBank, Stream, Views
from tasks.train_meta import MetaJob, save_model
from tests.models.drawn import ENCODER, SIZE, drawn_frames, tiny_encoder
from tests.models.fusers.small import small


class Noise:
    """A translator whose picture is nothing but its seed."""

    @classmethod
    def load(cls, folder):
        return cls()

    def translate(self, images, seeds):
        return [
            np.random.default_rng(seed).integers(0, 256, (*image.shape, 3), dtype=np.uint8)
            for image, seed in zip(images, seeds, strict=True)
        ]


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"), train=12, test=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, frames) -> Path:
    """What the meta training saves: two folds whose experts have moved away from their start, and a colour map."""
    folders = [tmp_path_factory.mktemp(name) for name in ("frames", "a", "b", "encoder", "base", "translators")]
    save_encoder(folders[3], ENCODER)
    ThermalColour.fit("rgb", [], []).save(folders[5] / "rgb")
    settings = ExpertSettings(base_width=16, anchored=AnchoredSettings(width=8, metric=6))
    experts, channels = nn.ModuleDict(), tiny_encoder().channels
    for fold in (0, 2):
        torch.manual_seed(fold)
        experts[str(fold)] = Expert(channels, frames.base(fold), 2, settings)
        for learner in experts[str(fold)].ensemble.learners:
            nn.init.normal_(learner.correct.out.weight)
            nn.init.ones_(learner.trust)
    job = MetaJob(MetaSettings(size=SIZE, expert=ExpertSettings(anchored=settings.anchored)), (0, 2), "thermal")
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, experts, frames, job, folders, Best(experts))
    return folder


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor.load(folder)


@pytest.fixture(scope="module")
def shown(frames):
    """A picture and the mask of its largest object, twice over, at different sizes; and a query."""
    label = frames.label("train-00000")
    largest = max(frames.pixels("train-00000"), key=frames.pixels("train-00000").get)
    picture, mask = frames.infrared("train-00000"), (label == largest).astype(np.uint8)
    return frames.infrared("test-00000"), [picture, picture[:50, :80]], [mask, mask[:50, :80]]


def one(shown, k=0):
    query, supports, masks = shown
    return query, supports[k : k + 1], masks[k : k + 1]


def test_a_prediction_is_what_the_exam_gives(folder, frames, predictor, tmp_path):
    """The same frames through store, bank and expert, with pictures of the same translator."""
    translator = ThermalColour.load(folder / "translators" / "rgb")
    (tmp_path / "images").mkdir()
    for id in ("test-00000", "train-00000"):
        (tmp_path / layer_name(id, "rgb")).write_bytes(png_bytes(translator.translate([frames.infrared(id)], [0])[0]))
    _, encoder, experts = load_experts(folder)
    bank = FeatureBank(encoder, Views(frames, tmp_path), Canvas(SIZE))
    label = max(frames.pixels("train-00000"), key=frames.pixels("train-00000").get)
    batch = gather(bank, [EpisodeKey(0, label, "test-00000", ("train-00000",), 0)], ("infrared", "rgb"))
    final = experts[2](batch.query, batch.support, batch.masks).final
    expected = nn.functional.interpolate(final.softmax(1), SIZE, mode="bilinear", align_corners=False)[0, 1].detach()
    mask = (frames.label("train-00000") == label).astype(np.uint8)
    _, probability = predictor.predict(frames.infrared("test-00000"), [frames.infrared("train-00000")], [mask], fold=2)
    assert np.allclose(probability, expected.numpy(), atol=5e-3), "the bank rests in half precision"
    assert probability.std() > 0.01


@pytest.mark.parametrize("height, width", [(64, 96), (37, 101), (240, 80)])
def test_a_query_of_any_size_gets_a_mask_of_its_size(predictor, shown, height, width):
    query = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    mask, probability = predictor.predict(query, *shown[1:], fold=0)
    assert mask.shape == probability.shape == (height, width)
    assert mask.dtype == np.uint8 and probability.dtype == np.float32
    assert probability.min() >= 0 and probability.max() <= 1
    assert np.array_equal(mask, probability > 0.5)


def test_without_a_fold_the_experts_are_averaged(predictor, shown):
    each = [predictor.predict(*shown, fold=fold)[1] for fold in (0, 2)]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    assert np.allclose(predictor.predict(*shown)[1], np.mean(each, 0), atol=1e-6)


def test_the_same_call_gives_the_same_answer(folder, shown, tmp_path):
    """Also with a translator that is all seed: the seed comes from the picture, not from the order of calls."""
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["generator"] = "tests.models.segmenters.test_predictor:Noise"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    first, second = Predictor(tmp_path / "model"), Predictor(tmp_path / "model")
    torch.manual_seed(1)
    expected = first.predict(*shown, fold=0)
    torch.manual_seed(2)
    second.predict(shown[1][0], *one(shown)[1:], fold=0)
    for found, wanted in zip(second.predict(*shown, fold=0), expected, strict=True):
        assert np.array_equal(found, wanted)
    pictures = [first._layer(picture, "rgb") for picture in (shown[0], shown[1][0])]
    assert not np.array_equal(*pictures), "two pictures got one seed"


def test_the_order_of_supports_changes_nothing(predictor, shown):
    query, supports, masks = shown
    turned = predictor.predict(query, supports[::-1], masks[::-1], fold=0)[1]
    assert np.allclose(turned, predictor.predict(*shown, fold=0)[1], atol=1e-4)


def test_unknown_pixels_of_a_mask_are_neither(predictor, shown):
    """255 in a mask changes the answer, and is not taken for the object."""
    query, supports, masks = one(shown)
    holes = masks[0].copy()
    holes[:, :48][holes[:, :48] == 0] = 255
    asked = [predictor.predict(query, supports, [m], fold=0)[1] for m in (masks[0], holes, np.where(holes, 1, 0))]
    assert not np.allclose(asked[0], asked[1]) and not np.allclose(asked[1], asked[2])


def test_a_mask_of_another_size_is_told(predictor, shown):
    query, supports, masks = shown
    with pytest.raises(UsageError, match=r"Support 2 and its mask differ in size \(\(50, 80\) and \(64, 96\)\)"):
        predictor.predict(query, supports, [masks[0], masks[0]])


@pytest.mark.parametrize("value", [0, 255])
def test_an_empty_mask_is_told(predictor, shown, value):
    query, supports, masks = shown
    with pytest.raises(UsageError, match="mask of support 2 marks nothing; mark the object with 1"):
        predictor.predict(query, supports, [masks[0], np.full_like(masks[1], value)])


@pytest.mark.parametrize("count", [(0, 0), (2, 1)])
def test_supports_and_masks_come_in_pairs(predictor, shown, count):
    query, supports, masks = shown
    with pytest.raises(UsageError, match=rf"one mask per support; got {count[0]} supports and {count[1]} masks"):
        predictor.predict(query, supports[: count[0]], masks[: count[1]])


def test_an_unknown_fold_lists_the_known_ones(predictor, shown):
    with pytest.raises(UsageError, match="has the folds 0, 2; there is no fold 1"):
        predictor.predict(*shown, fold=1)


def test_a_colour_picture_is_told(predictor, shown):
    query, supports, masks = one(shown)
    with pytest.raises(UsageError, match=r"grey .*\[H, W\]"):
        predictor.predict(np.stack([query] * 3, -1), supports, masks)
    with pytest.raises(UsageError, match=r"grey .*\[H, W\]"):
        predictor.predict(query, [np.stack([supports[0]] * 3, -1)], [np.stack([masks[0]] * 3, -1)])


def test_a_missing_translator_is_told(folder, shown, tmp_path):
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("translators"))
    with pytest.raises(UsageError, match="reads rgb pictures and has no translator"):
        Predictor(tmp_path / "model").predict(*shown)


@pytest.fixture(scope="module")
def three(tmp_path_factory, frames) -> Path:
    """A model whose third stream is fused, by SGDFuse with masks, from the translated picture."""
    folders = [tmp_path_factory.mktemp(name) for name in "abcdefgh"]
    save_encoder(folders[3], ENCODER)
    ThermalColour.fit("rgb", [], []).save(folders[5] / "rgb")
    small("sgdfuse", head="eps").save(folders[7])
    torch.manual_seed(0)
    settings = ExpertSettings(base_width=16, anchored=AnchoredSettings(width=8))
    expert = Expert(tiny_encoder().channels, frames.base(0), 3, settings)
    for learner in expert.ensemble.learners:
        nn.init.normal_(learner.correct.out.weight)
    meta = MetaSettings(size=SIZE, expert=settings, streams=(*STREAMS, Stream("fused", "fused")))
    fuse = FuserSettings("sgdfuse", visible="rgb", masks=MaskSettings("levels", stability=0.5))
    experts, folder = nn.ModuleDict({"0": expert}), tmp_path_factory.mktemp("three")
    save_model(folder, experts, frames, MetaJob(meta, (0,), "thermal", fuse), folders, Best(experts))
    return folder


def test_a_fused_stream_is_fused_from_the_translation(three, shown):
    made, fuser = Predictor(three), load_fuser(three / "fuser")
    translated = made._layer(shown[0], "rgb")
    aux = MaskProvider(MaskSettings("levels", stability=0.5)).aux(shown[0], translated)
    expected = fuser.pictures([shown[0]], [translated], [{"seeds": [_seed(shown[0])], **aux}])[0]
    assert np.array_equal(made._layer(shown[0], "fused"), expected)
    answers = [Predictor(three).predict(*shown, fold=0)[1] for _ in range(2)]
    assert np.array_equal(*answers) and answers[0].shape == shown[0].shape


def test_without_the_picture_it_learnt_from_a_fused_stream_goes_on(three, shown, tmp_path):
    """Masks of files and real visible pictures do not exist here; the RGB picture and no masks take their place."""
    shutil.copytree(three, tmp_path / "model")
    config = json.loads((three / "config.json").read_text())
    config["fuse"] |= {"visible": "visible", "steps": 1}
    config["fuse"]["masks"] |= {"backend": "file", "folder": "elsewhere"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    made = Predictor(tmp_path / "model")
    told = {"seeds": [_seed(shown[0])], "steps": 1}
    expected = load_fuser(three / "fuser").pictures([shown[0]], [made._layer(shown[0], "rgb")], [told])[0]
    assert np.array_equal(made._layer(shown[0], "fused"), expected)
    assert made.predict(*shown)[0].shape == shown[0].shape


def test_the_folder_says_what_it_holds(folder, frames):
    config, encoder, experts = load_experts(folder)
    assert config["base"] == {"0": list(frames.base(0)), "2": list(frames.base(2))}
    assert config["expert"]["base_width"] == 16 and config["size"] == list(SIZE)
    assert sorted(experts) == [0, 2] and experts[2].base_classes == frames.base(2)
    assert not any(module.training for expert in (encoder, *experts.values()) for module in expert.modules())
