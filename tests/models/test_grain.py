"""Noise is measured as it was made, and pictures get what they lack of it."""

from __future__ import annotations

import numpy as np
import pytest

from models.grain import Grain, noise_level
from tests.models.drawn import drawn_frames


def scene(size=(60, 80), noise=0.0, seed=0, channels=()):
    """Two flat halves and a slope, with white noise of that deviation."""
    y, x = np.mgrid[: size[0], : size[1]]
    clean = 60 + 0.5 * x + 60.0 * (y > size[0] // 2)
    grains = np.random.default_rng(seed).normal(0, noise, (*size, *channels))
    made = clean.reshape(*size, *(1 for _ in channels)) + grains
    return made.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("noise", [2.0, 6.0, 12.0])
def test_noise_is_measured_as_it_was_made(noise, channels):
    assert noise_level(scene(noise=noise, channels=channels)) == pytest.approx(noise, rel=0.1)


def test_edges_and_slopes_are_no_noise():
    assert noise_level(scene()) < 0.3


def test_a_clean_picture_becomes_as_noisy_as_one_of_the_real_ones():
    real = Grain(scene(noise=s, seed=n) for n, s in enumerate((4.0, 9.0)))
    found = [noise_level(real.add(scene(), f"p{n}")) for n in range(12)]
    near = {min((4, 9), key=lambda level: abs(level - one)) for one in found}
    assert near == {4, 9}, "each takes after one of them"
    assert all(min(abs(one - 4), abs(one - 9)) < 1.0 for one in found)


def test_noise_that_is_there_already_counts():
    real = Grain([scene(noise=6.0)])
    assert noise_level(real.add(scene(noise=4.0, seed=5), "p")) == pytest.approx(6.0, rel=0.12)
    noisier = scene(noise=12.0, seed=6)
    assert (real.add(noisier, "p") == noisier).all()


def test_pictures_come_at_the_scale_of_the_real_ones():
    real = Grain([scene(noise=5.0, channels=(3,))])
    assert real.add(scene((30, 30), channels=(3,)), "p").shape == (60, 60, 3)
    assert real.add(scene((240, 240)), "p").shape == (60, 60)
    assert noise_level(real.add(scene((240, 240), noise=10.0), "p")) == pytest.approx(5.0, rel=0.15), "shrunk first"


def test_the_key_decides():
    real = Grain([scene(noise=5.0)])
    one, same, other = (real.add(scene(), key) for key in ("p", "p", "q"))
    assert (one == same).all() and (one != other).any()


def test_without_real_pictures_nothing_changes():
    assert (Grain([]).add(scene(), "p") == scene()).all()


def test_toy_frames_are_noisy(tmp_path):
    frames = drawn_frames(tmp_path)
    levels = Grain(frames.infrared(id) for id in frames.ids("train")).levels
    assert min(levels) > 1.0, "the toy camera has 1.5 to 4.5 levels"
