"""Thresholds from the supports' own views: leave one out, one shot, and a class that is nowhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from models.geometry import Canvas
from models.prototypes import SYN4SEG, Support, support_prototypes
from tests.models.drawn import tiny_encoder

CANVAS = Canvas((64, 96))
SETTINGS = replace(SYN4SEG, min_area=0)


def shown(id, class_id, value, place=20):
    """A bright square of one class on grey."""
    picture, label = np.full((64, 96), 90, np.uint8), np.zeros((64, 96), np.uint8)
    picture[place : place + 24, 30:60], label[place : place + 24, 30:60] = value, class_id
    return Support(id, picture, label)


def brightness(image):
    """f̂ [3, 8, 12] that knows how bright each cell is."""
    grey = torch.nn.functional.avg_pool2d(image.mean(0)[None, None], 8)[0, 0]
    return normalize(torch.stack([grey, 1 - grey, torch.full_like(grey, 0.2)]), dim=0)


def found(supports, views=8, **changes):
    return support_prototypes(supports, brightness, 4, CANVAS, replace(SETTINGS, **changes), views)


def test_each_class_has_the_mean_of_its_own_supports():
    result = found([shown("a", 1, 250), shown("b", 1, 230), shown("c", 3, 10)])
    bright = normalize(torch.tensor([240 / 255, 1 - 240 / 255, 0.2]), dim=0)
    assert result.prototypes[1] @ bright > 0.97 and result.prototypes[3] @ bright < 0.6
    assert torch.equal(result.prototypes[2], torch.zeros(3))
    assert result.thresholds[2] == SETTINGS.fallback


def test_thresholds_follow_the_views():
    alike = found([shown("a", 1, 250), shown("b", 1, 250)])
    unlike = found([shown("a", 1, 250), shown("b", 1, 20)])
    assert 0.8 < alike.thresholds[1] < 0.95
    assert unlike.thresholds[1] < 0.5
    views = alike.similarity[alike.class_id == 1]
    low = np.quantile(views[~np.isnan(views)], SETTINGS.quantile) - SETTINGS.slack
    assert alike.thresholds[1] == pytest.approx(low)


def test_with_two_supports_a_view_is_judged_by_the_other():
    """Each support is perfectly like itself; only the other one can tell that they differ."""
    result = found([shown("a", 1, 250), shown("b", 1, 20)])
    views = result.similarity[result.class_id == 1]
    assert np.nanmax(views) < 0.7
    alone = found([shown("a", 1, 250)])
    assert np.nanmedian(alone.similarity[alone.class_id == 1]) > 0.95 and alone.thresholds[1] > 0.7


def test_views_depend_on_the_supports_name_and_the_seed_only():
    two = [shown("a", 1, 250), shown("b", 3, 20)]
    first, again = found(two), found(two[::-1])
    assert np.allclose(first.thresholds, again.thresholds)
    renamed = found([shown("z", 1, 250), two[1]])
    assert renamed.thresholds[1] != first.thresholds[1] and renamed.thresholds[3] == pytest.approx(first.thresholds[3])


def test_a_given_threshold_needs_no_views():
    calls = []
    result = support_prototypes([shown("a", 1, 250)], lambda image: calls.append(1) or brightness(image), 4, CANVAS,
                                replace(SETTINGS, lam=0.7))
    assert len(calls) == 1 and result.thresholds.tolist() == [0.7] * 4


def test_a_real_encoder_serves(tmp_path):
    encoder = tiny_encoder()

    def describe(image):
        return normalize(encoder(image[None]).mid[0], dim=0)

    result = support_prototypes([shown("a", 1, 250)], describe, 4, CANVAS, SETTINGS, views=6)
    assert result.prototypes.shape == (4, 192) and result.prototypes[1].norm() == pytest.approx(1, abs=1e-5)
    assert SETTINGS.floor <= result.thresholds[1] <= 1
