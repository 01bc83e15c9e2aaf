"""The control without diffusion."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.color import rgb2lab

from models.errors import UsageError
from models.generators.pictures import lightness_picture
from models.generators.thermal import ThermalColour, colour_map


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_lightness_takes_the_histogram_of_the_visible_set(rng):
    visible = [rng.normal(150, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8) for _ in range(3)]
    target = np.concatenate([lightness_picture(picture).ravel() for picture in visible])
    infrared = (rng.random((64, 64)) ** 3 * 255).astype(np.uint8)
    (matched,) = ThermalColour.fit("lightness", [], visible).translate([infrared], [0])
    for q in (10, 50, 90):
        assert np.percentile(matched, q) == pytest.approx(np.percentile(target, q), abs=4)
    order = np.argsort(infrared, axis=None)
    assert (np.diff(matched.ravel()[order].astype(int)) >= 0).all(), "the order of grey levels changed"


def test_without_visible_pictures_there_is_still_a_lightness(rng):
    infrared = rng.integers(0, 40, (32, 32), dtype=np.uint8)
    (matched,) = ThermalColour.fit("lightness", [], []).translate([infrared], [0])
    assert 90 < matched.mean() < 140 and matched.std() > 30


def test_colours_keep_the_lightness_and_turn_the_hue():
    table = colour_map()
    lab = rgb2lab(table[None])[0]
    assert (np.diff(lab[:, 0]) > -0.5).all() and lab[0, 0] < 20 and lab[-1, 0] > 85
    assert lab[20, 2] < -20 and lab[230, 2] > 10, "from blue to yellow"
    assert len(np.unique(table, axis=0)) == 256
    (picture,) = ThermalColour.fit("rgb", [], []).translate([np.array([[0, 255]], np.uint8)], [0])
    assert picture.shape == (1, 2, 3) and np.array_equal(picture[0, 1], table[255])


def test_it_is_saved_whole(tmp_path, rng):
    fitted = ThermalColour.fit("lightness", [], [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)])
    fitted.save(tmp_path)
    infrared = [rng.integers(0, 256, (16, 16), dtype=np.uint8)]
    assert np.array_equal(ThermalColour.load(tmp_path).translate(infrared, [1])[0], fitted.translate(infrared, [2])[0])


def test_a_wrong_direction_is_named():
    with pytest.raises(UsageError, match="lightness, rgb"):
        ThermalColour("depth", range(256))
