"""A thing lands on a frame with its label, its size, its light and its noise, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from models.paste import NEAR, SCALES, noise_level, paste
from models.pseudolabels import IGNORE

K, SIZE = 7, (60, 80)


def scene(size=(60, 80), noise=0.0, seed=0, channels=()):
    """Two flat halves and a slope, with white noise of that deviation."""
    y, x = np.mgrid[: size[0], : size[1]]
    clean = 60 + 0.5 * x + 60.0 * (y > size[0] // 2)
    grains = np.random.default_rng(seed).normal(0, noise, (*size, *channels))
    made = clean.reshape(*size, *(1 for _ in channels)) + grains
    return made.round().clip(0, 255).astype(np.uint8)


def drawn(ground=120, thing=(200, 40, 40), side=40, size=(40, 40)):
    """A picture with a square in its middle, and the square's mask."""
    mask = np.zeros(size, bool)
    start = (size[0] - side // 2) // 2
    mask[start : start + side // 2, start : start + side // 2] = True
    picture = np.full((*size, 3), ground, np.uint8)
    picture[mask] = thing
    return picture, mask


def frame(level=120, noise=0.0, channels=(3,)):
    picture = np.full((*SIZE, *channels), level, float)
    noisy = picture + np.random.default_rng(0).normal(0, noise, picture.shape)
    known = np.zeros(SIZE, np.uint8)
    known[:, :20] = 2
    return noisy.round().clip(0, 255).astype(np.uint8), known


@pytest.mark.parametrize("channels", [(), (3,)])
def test_the_thing_is_where_its_label_is_and_the_rest_stays(channels):
    real, known = frame(channels=channels)
    picture, label = paste(real, known, *drawn(), K, "p")
    assert picture.shape == real.shape and picture.dtype == np.uint8 and label.dtype == np.uint8
    changed = np.abs(np.atleast_3d(picture).astype(int) - np.atleast_3d(real)).max(-1) > 20
    both, either = (changed & (label == K)).sum(), (changed | (label == K)).sum()
    assert both > 0.9 * either > 0
    assert (picture[label == IGNORE] == real[label == IGNORE]).all()
    assert (real == frame(channels=channels)[0]).all() and (known == frame()[1]).all(), "nothing given is changed"


def test_background_is_known_near_the_thing_alone_and_base_classes_everywhere():
    real, known = frame()
    _, label = paste(real, known, *drawn(), K, "p")
    there = np.argwhere(label == K)
    for row, column in np.argwhere(known == 0):
        gap = np.hypot(*(there - (row, column)).T).min()
        assert label[row, column] == (K if gap == 0 else 0 if gap <= NEAR * 60 else IGNORE)
    assert set(np.unique(label[known == 2])) <= {2, K}


def test_sizes_and_places_differ_with_the_key_alone():
    real, known = frame()
    made = [paste(real, known, *drawn(), K, f"p{n}")[1] == K for n in range(40)]
    areas = np.array([one.sum() for one in made]) ** 0.5 / 20 / (60 / 40)  # sides, of a picture that fits the frame
    assert SCALES[0] - 0.05 < areas.min() < 0.7 and 0.9 < areas.max() < SCALES[1] + 0.05
    places = np.array([np.argwhere(one).mean(0) for one in made])
    assert places.min(0).max() < 20 and (places.max(0) > (40, 60)).all()
    again = paste(real, known, *drawn(), K, "p3")
    assert (again[1] == K)[made[3]].all() and (again[0] == paste(real, known, *drawn(), K, "p3")[0]).all()


def test_the_thing_is_lit_as_the_frame_is():
    level = {ground: frame(ground) for ground in (40, 120)}
    dark, day = (paste(*level[ground], *drawn(120), K, "p") for ground in (40, 120))
    seen = [picture[label == K].mean() for picture, label in (dark, day)]
    assert seen[0] / seen[1] == pytest.approx(1 / 3, rel=0.1)
    night = paste(*level[120], *drawn(1, (3, 1, 1)), K, "p")
    assert night[0][night[1] == K].mean() < 15, "never lit more than threefold"


def test_it_gets_the_noise_that_it_lacks():
    real, known = scene(SIZE, noise=8.0, channels=(3,)), frame()[1]
    picture = np.full((40, 40, 3), 100, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[4:36, 4:36] = True
    made, label = paste(real, known, picture, mask, K, "p")
    there = np.argwhere(label == K)
    (top, left), (bottom, right) = there.min(0) + 2, there.max(0) - 2
    assert noise_level(made[top:bottom, left:right]) == pytest.approx(8.0, rel=0.25)


def test_nothing_to_paste_changes_nothing():
    real, known = frame()
    picture, mask = drawn()
    made, label = paste(real, known, picture, np.zeros_like(mask), K, "p")
    assert (made == real).all() and (label == known).all()


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("noise", [2.0, 6.0, 12.0])
def test_noise_is_measured_as_it_was_made(noise, channels):
    assert noise_level(scene(noise=noise, channels=channels)) == pytest.approx(noise, rel=0.1)


def test_edges_and_slopes_are_no_noise():
    assert noise_level(scene()) < 0.3
