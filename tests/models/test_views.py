"""Layers, labels and features of frames: each picture encoded once, each label as training may see it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from models.frames import Frames, layer_name, png_bytes
from models.geometry import Canvas, as_image
from models.views import FeatureBank, PseudoViews, Views, encode, episode_mask
from tests.models.drawn import SIZE, drawn_frames, drawn_translations, tiny_encoder

A, B, C = (("train-00000", "infrared"), ("train-00001", "infrared"), ("train-00000", "rgb"))


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    frames = drawn_frames(tmp_path_factory.mktemp("frames"), train=4, test=1)
    return Views(frames, drawn_translations(tmp_path_factory.mktemp("synthetic"), frames))


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


@pytest.fixture
def calls(encoder):
    """How many pictures each call of the encoder was given."""
    sizes = []
    handle = encoder.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    yield sizes
    handle.remove()


def bank(encoder, views, **options):
    return FeatureBank(encoder, views, Canvas(SIZE), **options)


def weight(bank):
    """Bytes of one picture's features at rest."""
    height, width = bank.grid
    return 2 * sum(bank.encoder.channels) * height * width


# ---- the bank


def test_a_bank_of_another_seed_encodes_its_own_pseudo_queries_and_no_frame_again(encoder, views, calls):
    first = bank(encoder, PseudoViews(views.frames, views.synthetic, seed=1))
    query = first.views.show("train-00000", 3)[1], "infrared"
    before = first.get([A, B, query])
    other = first.showing(first.views.of_seed(2))
    after = other.get([A, B, query])
    assert calls == [3, 1]
    assert all(torch.equal(x[:2], y[:2]) for x, y in zip(before, after, strict=True))
    assert not torch.equal(before[0][2], after[0][2])


def test_each_picture_is_encoded_once(encoder, views, calls):
    held = bank(encoder, views)
    held.get([A, B, A])
    held.get([B, A])
    held.get([C, A])
    assert calls == [2, 1]


def test_missing_pictures_go_through_in_batches(encoder, views, calls):
    keys = [(f"train-0000{n}", layer) for n in range(4) for layer in ("infrared", "lightness")]
    bank(encoder, views, batch=3).get(keys)
    assert calls == [3, 3, 2]


def test_batches_equal_singles_in_the_order_asked(encoder, views):
    together = bank(encoder, views).get([C, A, B])
    for n, key in enumerate((C, A, B)):
        alone = bank(encoder, views, batch=1).get([key])
        for many, one in zip(together, alone, strict=True):
            assert many.dtype == torch.float32
            assert torch.allclose(many[n], one[0], rtol=2e-3, atol=2e-3) and not torch.allclose(many[n - 1], one[0])


def test_features_are_those_of_the_picture_on_the_canvas(encoder, views):
    small = FeatureBank(encoder, views, Canvas((32, 48)))
    picture = torch.from_numpy(views.picture(*C)).permute(2, 0, 1).float() / 255
    expected = encode(encoder, Canvas((32, 48)).image(picture)[None])
    assert small.grid == (4, 6) and expected.low.shape[-2:] == (4, 6)
    for found, level in zip(small.get([C]), expected, strict=True):
        assert torch.allclose(found, level, rtol=2e-3, atol=2e-3)


def test_the_budget_holds_and_the_oldest_goes(encoder, views, calls):
    held = bank(encoder, views)
    held.get([A])
    assert held.bytes == weight(held)
    held = bank(encoder, views, budget=2 * weight(held) + 1)
    for key in (A, B, C):
        held.get([key])
        assert held.bytes == len(held.held) * weight(held) <= held.budget
    assert list(held.held) == [B, C]
    calls.clear()
    held.get([B, C])
    held.get([A])
    assert calls == [1] and list(held.held) == [C, A]
    held.get([C])
    held.get([B])
    assert list(held.held) == [C, B], "the one that was asked for least lately goes"


def test_without_a_budget_nothing_is_held_and_all_is_the_same(encoder, views, calls):
    poor, rich = bank(encoder, views, budget=0), bank(encoder, views)
    for _ in range(2):
        for few, many in zip(poor.get([A, B]), rich.get([A, B]), strict=True):
            assert torch.equal(few, many)
    assert not poor.held and poor.bytes == 0 and calls == [2, 2, 2]


def test_one_call_may_ask_for_more_than_the_budget(encoder, views):
    held = bank(encoder, views, budget=weight(bank(encoder, views)))
    for _ in range(2):
        assert len(held.get([A, B, C, A]).low) == 4
        assert held.bytes <= held.budget


def test_a_gradient_may_flow_through_what_is_learnt_on_features(encoder, views):
    scale = torch.ones((), requires_grad=True)
    (bank(encoder, views).get([A]).mid * scale).sum().backward()
    assert scale.grad.isfinite()


# ---- pictures and labels

LABEL = np.array([[0, 1, 1, 2, 2, 3, 3, 255]] * 4, np.uint8)
NOVEL = (3,)


@pytest.fixture
def barn(tmp_path):
    """One frame with the classes 1, 2 and 3; in its RGB picture class 1 and 3 were freed, and 2 in the first row."""
    refined = LABEL.copy()
    refined[(LABEL == 1) | (LABEL == 3)] = 255
    refined[0, LABEL[0] == 2] = 255
    files = {"label": LABEL, "infrared": LABEL * 9, "lightness": LABEL * 5, "rgb": np.stack([LABEL] * 3, -1)}
    (tmp_path / "images").mkdir()
    for layer, picture in (files | {"rgb.label": refined}).items():
        (tmp_path / layer_name("a", layer)).write_bytes(png_bytes(picture))
    row = {"id": "a", "split": "train", "visible": None, "height": 4, "width": 8, "sha256": "", "classes": "{}"}
    row |= {layer: layer_name("a", layer) for layer in ("infrared", "label")}
    info = {"dataset": "barn", "classes": ["x", "y", "z"], "palette": [], "folds": [["z"]], "ignored": []}
    return Frames(tmp_path, pd.DataFrame([row]), json.loads(json.dumps(info)))


def test_pictures_come_from_the_stage_that_made_them(barn, tmp_path):
    views = Views(barn, tmp_path)
    assert np.array_equal(views.picture("a", "infrared"), LABEL * 9)
    assert np.array_equal(views.picture("a", "lightness"), LABEL * 5)
    assert views.picture("a", "rgb").shape == (4, 8, 3)
    assert [views.has("a", layer) for layer in ("infrared", "visible", "rgb", "rgb_lightness")] == [1, 0, 1, 0]
    assert not Views(barn).has("a", "rgb")


def test_a_fused_picture_has_a_folder_of_its_own(barn, tmp_path):
    (tmp_path / "apart" / "images").mkdir(parents=True)
    (tmp_path / "apart" / layer_name("a", "fused")).write_bytes(png_bytes(LABEL * 7))
    for made in (Views(barn, tmp_path, fused=tmp_path / "apart"), PseudoViews(barn, fused=tmp_path / "apart")):
        assert made.has("a", "fused") and np.array_equal(made.picture("a", "fused"), LABEL * 7)
    (tmp_path / layer_name("a", "fused")).write_bytes(png_bytes(LABEL))
    assert not Views(barn, tmp_path).has("a", "fused"), "translations hold none"


@pytest.mark.parametrize("policy, hidden", [("ignore", 255), ("background", 0), ("drop", 255)])
@pytest.mark.parametrize("layer", ["infrared", "lightness"])
def test_novel_classes_are_hidden_by_the_policy(barn, tmp_path, policy, hidden, layer):
    seen = Views(barn, tmp_path, tmp_path).label("a", layer, NOVEL, policy)
    assert np.array_equal(seen, np.where(LABEL == 3, hidden, LABEL))


def test_in_testing_nothing_is_hidden(barn, tmp_path):
    assert np.array_equal(Views(barn, tmp_path).label("a"), LABEL)


@pytest.mark.parametrize("policy, hidden", [("ignore", 255), ("background", 0)])
def test_freed_base_regions_are_ignored_on_the_layer_they_were_freed_on(barn, tmp_path, policy, hidden):
    """And a freed novel region does not show: under "background" it is 0 like the rest of its class."""
    views = Views(barn, tmp_path, tmp_path)
    expected = np.where(LABEL == 3, hidden, LABEL)
    expected[LABEL == 1] = 255
    expected[0, LABEL[0] == 2] = 255
    assert np.array_equal(views.label("a", "rgb", NOVEL, policy), expected)
    assert 1 in views.label("a", "infrared", NOVEL, policy)


def test_without_refined_labels_all_layers_share_the_label(barn, tmp_path):
    assert np.array_equal(Views(barn, tmp_path).label("a", "rgb", NOVEL), np.where(LABEL == 3, 255, LABEL))


def test_an_episode_mask_knows_one_class_and_what_is_unknown():
    mask = episode_mask(LABEL, 2)
    assert mask.dtype == torch.uint8 and mask[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 255]
    assert episode_mask(LABEL, 9)[0].tolist() == [0] * 7 + [255]
    assert LABEL[0].tolist() == [0, 1, 1, 2, 2, 3, 3, 255], "the label itself was changed"


def test_features_may_rest_in_full_precision(encoder, views):
    half, full = bank(encoder, views), bank(encoder, views, rest=torch.float32)
    exact = encode(encoder, Canvas(SIZE).image(as_image(views.picture(*C)))[None])
    for low, high, level in zip(half.get([C]), full.get([C]), exact, strict=True):
        assert torch.allclose(high, level, atol=1e-6) and not torch.allclose(low, level, atol=1e-6)
    assert full.bytes == 2 * half.bytes == 2 * weight(half)


def test_the_grid_of_a_canvas_of_8n_plus_1_has_one_cell_more(encoder, views):
    odd = FeatureBank(encoder, views, Canvas((65, 97)))
    assert odd.grid == (9, 13) and odd.get([A]).low.shape[-2:] == (9, 13)
