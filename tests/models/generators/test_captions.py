"""Captions of toy pictures tell names, light and tints, and their tints are what a mask would say."""

import colorsys

import numpy as np
import pytest

from models.datasets.toy import Toy
from models.generators.captions import Look, caption_of, look_of
from models.generators.words import TINTS

TIDY = {"size": (64, 64), "test": 0, "noise": 0.0, "clutter": False, "scale": 1.2}
LOOK = Look(dark=True, ground="blue", thing="red")


def painted(ground, thing):
    """A picture uint8 [20, 20, 3] with a thing on a third of it."""
    picture = np.full((20, 20, 3), ground, np.uint8)
    picture[4:16, 4:16] = thing
    return picture


@pytest.mark.parametrize(("colour", "tint"), [
    ((200, 30, 30), "red"), ((200, 30, 60), "red"), ((180, 190, 60), "yellow"), ((90, 130, 95), "green"),
    ((10, 40, 40), "cyan"), ((60, 60, 90), "blue"), ((90, 60, 90), "purple"),
])
def test_the_ground_is_most_of_the_picture_and_the_thing_what_stands_out(colour, tint):
    other = np.roll(colour, 1)
    vivid = (other - other.min()) * (255 // (other.max() - other.min()))
    found, turned = look_of(painted(colour, vivid)), look_of(painted(vivid, colour))
    assert found.ground == turned.thing == tint and found.thing == turned.ground != tint


def test_light_alone_does_not_stand_out():
    picture = painted((40, 40, 80), (80, 40, 40))
    picture[:2] = (120, 120, 240)  # the ground in thrice the light: farther in grey levels than the thing
    assert look_of(picture) == Look(dark=True, ground="blue", thing="red")


def test_the_tints_of_toy_pictures_are_those_under_their_masks():
    """Nearly always, though no mask is asked."""
    toy = Toy(train=100, objects=(1, 1), seed=1, **TIDY)
    hits = []
    for item in toy.items():
        picture = toy.read(item)
        hue = colorsys.rgb_to_hsv(*np.median(picture.visible[picture.label > 0], axis=0))[0]
        hits.append(look_of(picture.visible).thing == TINTS[round(hue * len(TINTS)) % len(TINTS)])
    assert np.mean(hits) >= 0.9


def test_captions_tell_tints_now_and_then():
    said = [caption_of(["arch"], LOOK, step) for step in range(400)]
    shares = {text: said.count(text) / len(said) for text in said}
    expected = {"an arch on dark ground", "an arch on dark blue ground", "a red arch on dark ground",
                "a red arch on dark blue ground"}
    assert set(shares) == expected and min(shares.values()) > 0.18, "each of two tints half of the times"
    assert said == [caption_of(["arch"], LOOK, step) for step in range(400)]


def test_captions_name_all_that_is_there_and_nothing_about_where():
    said = {caption_of(["arch", "star"], Look(False, "blue", "red"), step) for step in range(40)}
    assert said == {f"{first} and {second} on bright {ground}ground" for ground in ("", "blue ")
                    for first, second in (("an arch", "a star"), ("a star", "an arch"))}
