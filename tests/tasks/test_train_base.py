"""What a step of the base learners sees: labels without a novel class, in every fold and under every policy."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from models.backbone import Features
from models.episode import POLICIES
from models.errors import UsageError
from models.frames import layer_name
from models.segmenters.pspnet import PSPNet
from models.views import Views
from tasks.train_base import BaseJob, BaseSettings, _Batches, _Heads, _remap, save_heads
from tests.models.drawn import SIZE, drawn_frames, drawn_refined, drawn_translations

FOLDS = (0, 1, 2, 3)
SETTINGS = BaseSettings(size=SIZE, width=16, batch=4)
STEPS = range(12)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def views(frames, tmp_path_factory):
    refined = drawn_refined(tmp_path_factory.mktemp("refined"), frames)
    return Views(frames, drawn_translations(tmp_path_factory.mktemp("synthetic"), frames), refined)


def batches(views, folds=FOLDS, **changes):
    return _Batches(views, BaseJob(replace(SETTINGS, **changes), folds), views.frames)


def halved(label):
    """The canvas is the frame; labels are learnt at half its size."""
    return interpolate(torch.from_numpy(label)[None, None], (32, 48), mode="nearest-exact")[0, 0].numpy()


@pytest.mark.parametrize("policy", POLICIES)
def test_no_novel_class_reaches_a_label(views, policy):
    """Every pixel of every fold against the true label: base classes by index, novel ones hidden, nothing else."""
    data, frames = batches(views, novel_in_train=policy, layers=("infrared",)), views.frames
    hidden = {fold: 0 for fold in FOLDS}
    for step in STEPS:
        keys, labels = data.batch(step, 0)
        for fold in FOLDS:
            assert labels[str(fold)].shape == (4, 32, 48) and labels[str(fold)].dtype == torch.uint8
            for (id, _), seen in zip(keys, labels[str(fold)].numpy(), strict=True):
                truth = halved(frames.label(id))
                expected = np.where(truth == 0, 0, 255)
                for index, label in enumerate(frames.base(fold), start=1):
                    expected[truth == label] = index
                novel = np.isin(truth, frames.novel(fold))
                if policy == "background":
                    expected[novel] = 0
                if policy == "drop" and not set(frames.novel(fold)).isdisjoint(frames.pixels(id)):
                    expected[:] = 255
                assert np.array_equal(seen, expected)
                assert not np.isin(seen[novel], range(1, 255)).any()
                hidden[fold] += novel.sum()
    assert min(hidden.values()) > 0, "no frame showed a novel class: nothing was tried"


def test_dropped_frames_are_not_even_drawn_when_one_fold_is_trained(views):
    data = batches(views, folds=(1,), novel_in_train="drop")
    novel = set(views.frames.novel(1))
    assert 0 < len(data.ids) < len(views.frames.ids("train"))
    assert all(novel.isdisjoint(views.frames.pixels(id)) for step in STEPS for id, _ in data.batch(step, 0)[0])


def test_only_training_frames_are_drawn(views):
    drawn = {id for step in range(40) for id, _ in batches(views).batch(step, 0)[0]}
    assert drawn == set(views.frames.ids("train"))


@pytest.mark.parametrize("policy", ["ignore", "background"])
def test_what_refine_freed_is_ignored_on_the_synthetic_layer(views, policy):
    """Objects left of the middle were freed; freed novel ones stay what the policy makes of them."""
    real = batches(views, novel_in_train=policy, layers=("infrared",))
    made = batches(views, novel_in_train=policy, layers=("lightness",))
    freed = 0
    for step in STEPS:
        (keys, labels), (others, plain) = made.batch(step, 0), real.batch(step, 0)
        assert [id for id, _ in keys] == [id for id, _ in others] and {layer for _, layer in keys} == {"lightness"}
        for fold in FOLDS:
            for (id, _), seen, before in zip(keys, labels[str(fold)].numpy(), plain[str(fold)].numpy(), strict=True):
                truth = halved(views.frames.label(id))
                base = np.isin(truth, views.frames.base(fold)) & (np.arange(48) < 24)
                assert np.array_equal(seen, np.where(base, 255, before))
                freed += base.sum()
    assert freed > 0


def test_a_batch_is_a_function_of_seed_step_and_rank(views):
    first, second = batches(views), batches(views)
    for step in reversed(STEPS):
        second.batch(step, 1)
    for step in STEPS:
        (keys, labels), (again, same) = first.batch(step, 1), second.batch(step, 1)
        assert keys == again and all(torch.equal(labels[f], same[f]) for f in labels)
    seen = [str(data.batch(step, rank)[0]) for data in (first, batches(views, seed=1)) for step in (0, 1)
            for rank in (0, 1)]
    assert len(set(seen)) == 8


def test_layers_are_drawn_evenly_and_a_missing_one_is_passed_over(views):
    layers = ("infrared", "lightness")
    drawn = [key for step in range(40) for key in batches(views, layers=layers).batch(step, 0)[0]]
    share = np.mean([layer == "lightness" for _, layer in drawn])
    assert 0.35 < share < 0.65
    bare = Views(views.frames)
    assert {layer for _, layer in _Batches(bare, BaseJob(SETTINGS, FOLDS), bare.frames).batch(0, 0)[0]} == {"infrared"}


def test_a_batch_is_never_larger_than_the_data(views):
    keys, labels = batches(views, batch=100).batch(0, 0)
    assert len(keys) == len(set(keys)) == len(labels["0"]) == 24


def test_pictures_and_labels_are_mirrored_together(views):
    data = batches(views)
    _, labels = data.batch(1, 0)
    side = torch.arange(48.0).view(1, 1, 1, 48)
    features = Features(side, side, side)
    same, turned = data.flipped(features, labels, 0), data.flipped(features, labels, 1)
    assert same == (features, labels)
    assert all(torch.equal(level, side.flip(-1)) for level in turned[0])
    assert all(torch.equal(turned[1][fold], labels[fold].flip(-1)) for fold in labels)
    assert batches(views, flip=False).flipped(features, labels, 1) == (features, labels)


def test_a_frame_without_any_layer_to_learn_from_is_passed_over(views, tmp_path):
    """Such as one that was quarantined in synthesis."""
    partly = Views(views.frames, shutil.copytree(views.synthetic, tmp_path / "synthetic"))
    (partly.synthetic / layer_name("train-00000", "lightness")).unlink()
    assert batches(partly, layers=("lightness",)).ids == views.frames.ids("train")[1:]
    assert batches(partly).ids == views.frames.ids("train")
    with pytest.raises(UsageError, match=r"No training frame with a picture of lightness is left .* or other layers"):
        batches(Views(views.frames), layers=("lightness",))


def test_nothing_left_to_learn_from_is_told(frames):
    everything = type(frames)(frames.folder, frames.rows, frames.info | {"folds": [frames.classes[:11]]})
    with pytest.raises(UsageError, match="is left under novel_in_train=drop; choose ignore"):
        batches(Views(everything), folds=(0,), novel_in_train="drop")


def test_an_unknown_policy_lists_the_known_ones():
    with pytest.raises(UsageError, match="no novel_in_train 'hide'; choose ignore, background, drop"):
        BaseSettings(novel_in_train="hide")


def test_labels_that_are_neither_base_nor_background_are_ignored():
    table = _remap((2, 5))
    assert table[[0, 2, 5]].tolist() == [0, 1, 2]
    assert set(table[[1, 3, 4, *range(6, 256)]]) == {255}


def test_each_fold_has_its_own_head_at_half_the_canvas(frames, tmp_path):
    from safetensors.torch import load_file

    job = BaseJob(SETTINGS, (0, 3))
    heads = torch.nn.ModuleDict({str(f): PSPNet((4, 6, 8), len(frames.base(f)), 16) for f in job.folds})
    logits = _Heads(heads.eval(), SIZE)(Features(*(torch.rand(2, c, 8, 12) for c in (4, 6, 8))))
    assert {fold: tuple(x.shape) for fold, x in logits.items()} == {"0": (2, 10, 32, 48), "3": (2, 10, 32, 48)}
    save_heads(tmp_path, heads, frames, job)
    for fold, head in heads.items():
        again = PSPNet((4, 6, 8), len(frames.base(int(fold))), 16)
        again.load_state_dict(load_file(tmp_path / f"fold{fold}.safetensors"))
        assert torch.equal(again.classify.weight, head.classify.weight)
    text = (tmp_path / "config.json").read_text()
    assert '"width": 16' in text and str(frames.base(3)[-1]) in text


def test_labels_lie_on_the_letterbox_as_pictures_do(views, frames):
    """BAM's canvas is square and the frame wide: its lower part holds nothing to learn."""
    data = batches(views, size=(65, 65), letterbox="bam", layers=("infrared",))
    _, labels = data.batch(0, 0)
    seen = labels["0"]
    assert seen.shape == (4, 32, 32) and (seen[:, 20:] == 255).all() and (seen[:, :19] != 255).any()
    logits = _Heads(torch.nn.ModuleDict({"0": PSPNet((4, 6, 8), 9, 16).eval()}), (65, 65))(
        Features(*(torch.rand(2, c, 9, 9) for c in (4, 6, 8)))
    )
    assert logits["0"].shape[-2:] == (32, 32)
