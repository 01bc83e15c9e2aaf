"""Corruptions: the same for a picture whatever else is corrupted, worse with severity, and what they say they are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from models.corruptions import CORRUPTIONS, SEVERITIES, STRENGTHS, corrupt, picture_seed
from models.datasets.toy import Toy
from models.errors import UsageError


@pytest.fixture(scope="module")
def pictures():
    toy = Toy(train=4, test=0)
    return {item.id: toy.read(item).infrared for item in toy.items()}


def psnr(picture, made):
    error = np.mean((picture.astype(float) - made) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_worse_than_the_one_before(name, pictures):
    for id, picture in pictures.items():
        made = [corrupt(picture, name, severity, picture_seed(0, id)) for severity in SEVERITIES]
        assert all(x.dtype == np.uint8 and x.shape == picture.shape for x in made)
        quality = [psnr(picture, x) for x in made]
        assert quality[0] == np.inf and (np.diff(quality) < -0.1).all(), (id, quality)
        assert quality[1] < 50 and quality[5] > 5, "neither invisible nor the end of the picture"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_picture_is_corrupted_alike_in_any_order(name, pictures):
    seeds = {id: picture_seed(3, id) for id in pictures}
    there = {id: corrupt(picture, name, 3, seeds[id]) for id, picture in pictures.items()}
    np.random.default_rng(0).random(7)
    back = {id: corrupt(pictures[id], name, 3, seeds[id]) for id in reversed(pictures)}
    assert all(np.array_equal(there[id], back[id]) for id in pictures)


@pytest.mark.parametrize("name", ["noise", "dead_pixels"])
def test_the_seed_draws_the_pattern_and_the_id_is_part_of_it(name, pictures):
    (id, picture), *_ = pictures.items()
    made = [corrupt(picture, name, 3, picture_seed(*key)) for key in ((0, id), (1, id), (0, "other"))]
    assert not any(np.array_equal(made[0], x) for x in made[1:])
    assert picture_seed(0, "a") == picture_seed(0, "a") != picture_seed(0, "b") and picture_seed(9, "a") < 2**63


def test_the_original_is_left_alone_and_severity_0_is_a_copy(pictures):
    (picture, *_) = pictures.values()
    before = picture.copy()
    for name in CORRUPTIONS:
        made = corrupt(picture, name, 0, 0)
        assert np.array_equal(made, picture) and made is not picture
        corrupt(picture, name, 5, 0)[:] = 7
    assert np.array_equal(picture, before)


def test_noise_has_its_deviation_and_a_fixed_pattern_of_columns():
    flat = np.full((400, 300), 128, np.uint8)
    left = corrupt(flat, "noise", 2, 5).astype(float) - 128
    columns = left.mean(0)
    assert columns.std() == pytest.approx(4, rel=0.2)
    assert (left - columns).std() == pytest.approx(8, rel=0.02)
    assert left.mean(1).std() < 1, "rows have none"


def test_blur_spreads_an_edge_by_its_deviation():
    edge = np.repeat(np.array([[0, 255]], np.uint8), 30, 1).repeat(5, 0)
    slope = np.diff(corrupt(edge, "blur", 3, 0)[2].astype(float)) / 255
    offset = np.arange(len(slope)) - 29
    assert slope.sum() == pytest.approx(1) and (slope * offset**2).sum() == pytest.approx(2**2, rel=0.1)


def test_a_poorer_sensor_sees_no_fine_stripes_and_all_of_the_coarse_ones():
    fine = np.tile(np.array([0, 255], np.uint8), (64, 32))
    coarse = np.repeat(fine[:, :8], 8, 1)
    assert corrupt(fine, "resolution", 2, 0).std() < 5 and corrupt(coarse, "resolution", 2, 0).std() > 100
    assert corrupt(fine[:3, :5], "resolution", 5, 0).shape == (3, 5)


def test_dead_pixels_stay_dead_and_are_as_many_as_said():
    flat = np.full((300, 400), 128, np.uint8)
    dead = [corrupt(flat, "dead_pixels", severity, 1) != 128 for severity in SEVERITIES]
    assert not any((weaker & ~stronger).any() for weaker, stronger in pairwise(dead))
    share = STRENGTHS["dead_pixels"][4]
    assert dead[5].mean() == pytest.approx(1 - (1 - share) * (1 - share / 4) ** 2, rel=0.15)
    lines = dead[5].all(0).sum(), dead[5].all(1).sum()
    assert 4 <= lines[0] <= 18 and 2 <= lines[1] <= 15
    assert set(np.unique(corrupt(flat, "dead_pixels", 5, 1))) == {0, 128, 255}


def test_contrast_keeps_the_mean_and_its_share_of_the_spread(pictures):
    for picture in pictures.values():
        made = corrupt(picture, "contrast", 4, 0)
        assert made.mean() == pytest.approx(picture.mean(), abs=0.5)
        assert made.std() == pytest.approx(0.2 * picture.std(), rel=0.1)
        assert len(np.unique(made)) < len(np.unique(picture)), "fine levels are lost"


def test_every_corruption_has_five_strengths():
    assert set(STRENGTHS) == set(CORRUPTIONS) and all(len(levels) == 5 for levels in STRENGTHS.values())


@pytest.mark.parametrize(("change", "sentence"), [
    ({"name": "fog"}, "'fog'; choose one of noise, blur"),
    ({"severity": 6}, "not 6"),
    ({"severity": 1.5}, "not 1.5"),
    ({"picture": np.zeros((4, 4, 3), np.uint8)}, r"uint8 \[4, 4, 3\]"),
    ({"picture": np.zeros((4, 4))}, "float64"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, sentence):
    asked = {"picture": np.zeros((4, 4), np.uint8), "name": "noise", "severity": 1, "seed": 0} | change
    with pytest.raises(UsageError, match=sentence):
        corrupt(**asked)
