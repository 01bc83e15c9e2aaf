"""Pseudo-classes: regions that are objects, queries that are the support moved, and the same draws in any order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.datasets.toy import Toy
from models.errors import UsageError
from models.pseudoclasses import PseudoSettings, Regions, episode, find_regions

PLAIN = PseudoSettings()
STILL = replace(PLAIN, rotate=0, shear=0, shift=0, zoom=0, flip=0)
TONELESS = {"gamma": 0, "gain": 0, "offset": 0, "noise": 0}
SIZE = (60, 80)


def scene():
    """A warm disc, a cold square and a hair that is too thin, on a ground with a little noise."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    picture = np.random.default_rng(0).normal(40, 1, SIZE)
    disc, square = (y - 20) ** 2 + (x - 22) ** 2 < 11**2, (abs(y - 40) < 9) & (abs(x - 60) < 9)
    hair = (abs(y - 6) < 1) & (x > 35) & (x < 75)
    picture[disc], picture[square], picture[hair] = 70, 15, 60
    return picture.clip(0, 255).astype(np.uint8), disc, square, hair


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope="module")
def drawn():
    """A frame of the toy set and its regions."""
    toy = Toy(train=1, test=0)
    picture = toy.read(toy.items()[0]).infrared
    return picture, find_regions(picture, PLAIN)


# ---- regions


@pytest.mark.parametrize("kind", ["superpixels", "blobs"])
def test_objects_are_found_and_hairs_are_not(kind):
    picture, disc, square, hair = scene()
    settings = replace(PLAIN, kinds=(kind,), compactness=0.4, scale=300, min_area=0.008)
    regions = find_regions(picture, settings)
    masks = [regions.mask(n) == 1 for n in range(1, len(regions) + 1)]
    for thing in (disc, square):
        assert max(overlap(mask, thing) for mask in masks) > 0.55, "superpixels leave the blurred outline out"
    assert all(overlap(mask, hair) < 0.3 for mask in masks)
    every = find_regions(picture, replace(settings, compactness=0.0))
    shapeless = [every.mask(n) == 1 for n in range(1, len(every) + 1)]
    assert max(overlap(mask, hair) for mask in shapeless) > 0.3, "it was the shape that kept the hair out"


def test_regions_have_the_size_and_the_numbers_they_say(drawn):
    picture, regions = drawn
    assert len(regions) >= 4 and set(regions.kind) == {0, 1}
    assert regions.index.shape == (2, *picture.shape) and regions.index.dtype == np.uint16
    for number, area in enumerate(regions.area, start=1):
        assert regions.mask(number).sum() == area
        assert PLAIN.min_area <= area / picture.size <= PLAIN.max_area
    assert set(np.unique(regions.index)) == set(range(len(regions) + 1))


def test_a_warm_and_a_cold_blob_that_touch_stay_two():
    picture = np.full(SIZE, 100, np.uint8)
    picture[20:40, 20:35], picture[20:40, 35:50] = 200, 0
    regions = find_regions(picture, replace(PLAIN, kinds=("blobs",)))
    assert len(regions) == 2
    for number in (1, 2):
        values = picture[regions.mask(number) == 1]
        assert np.mean(values > 150) > 0.85 or np.mean(values < 50) > 0.85


def test_a_dark_frame_has_the_regions_of_a_bright_one():
    picture, *_ = scene()
    dark = (picture // 3).astype(np.uint8)
    counts = [len(find_regions(x, replace(PLAIN, kinds=("blobs",)))) for x in (picture, dark)]
    assert counts[0] == counts[1] >= 2


def test_a_flat_frame_has_none_and_says_so():
    regions = find_regions(np.full(SIZE, 9, np.uint8), PLAIN)
    assert len(regions) == 0
    with pytest.raises(UsageError, match="Frame f7 has no region"):
        episode(np.full(SIZE, 9, np.uint8), regions, 0, "f7", 0, PLAIN)


# ---- episodes


def test_an_episode_is_the_support_and_the_same_moved(drawn):
    picture, regions = drawn
    made = episode(picture, regions, 0, "f0", 0, PLAIN)
    assert np.array_equal(made.support, picture) and made.support_mask.sum() == regions.area[made.region - 1]
    assert made.query.shape == picture.shape and made.query.dtype == made.query_mask.dtype == np.uint8
    assert set(np.unique(made.support_mask)) == {0, 1} and set(np.unique(made.query_mask)) <= {0, 1, 255}
    assert not np.array_equal(made.query, picture)


def test_without_movement_and_tones_the_query_is_the_support(drawn):
    picture, regions = drawn
    made = episode(picture, regions, 0, "f0", 0, replace(STILL, **TONELESS))
    assert np.array_equal(made.query, picture) and np.array_equal(made.query_mask, made.support_mask)


def test_picture_and_mask_move_together():
    """The region is painted white in a black frame, so the query shows where it went."""
    _, disc, *_ = scene()
    regions = Regions(disc.astype(np.uint16)[None], np.array([disc.sum()]), np.array([0]))
    picture = (255 * disc).astype(np.uint8)
    for number in range(20):
        made = episode(picture, regions, 1, "f0", number, replace(PLAIN, **TONELESS))
        known = made.query_mask != 255
        assert overlap(made.query[known] > 127, made.query_mask[known] == 1) > 0.95
        assert (made.query_mask == 1).sum() > 0.3 * disc.sum()
    offsets = {tuple(np.argwhere(episode(picture, regions, 1, "f0", n, PLAIN).query_mask == 1).mean(0).round())
               for n in range(20)}
    assert len(offsets) > 10


def test_pixels_that_come_in_from_outside_are_ignored():
    """A frame that is 0 left of the middle, moved by shifts alone: 255 covers just what the frame does not."""
    mask = np.zeros(SIZE, np.uint16)
    mask[25:35, 35:45] = 1
    regions = Regions(mask[None], np.array([100]), np.array([0]))
    settings = replace(STILL, shift=0.2, **TONELESS)
    for number in range(10):
        made = episode(np.zeros(SIZE, np.uint8), regions, 0, "f0", number, settings)
        rows, columns = np.argwhere(made.query_mask == 1).mean(0) - (29.5, 39.5)
        lost = 1 - (1 - abs(rows) / SIZE[0]) * (1 - abs(columns) / SIZE[1])
        assert (made.query_mask == 255).mean() == pytest.approx(lost, abs=0.03) and lost > 0


def test_without_shifts_the_middle_stays_where_it_is():
    mask = np.zeros(SIZE, np.uint16)
    mask[25:35, 35:45] = 1
    regions = Regions(mask[None], np.array([100]), np.array([0]))
    made = [episode(mask, regions, 0, "f0", n, replace(PLAIN, shift=0)).query_mask for n in range(12)]
    assert all(np.allclose(np.argwhere(x == 1).mean(0), (29.5, 39.5), atol=0.4) for x in made)
    areas = [(x == 1).sum() for x in made]
    assert min(areas) < 90 and max(areas) > 110


def test_enough_of_the_region_stays_in_the_frame():
    corner = np.zeros(SIZE, np.uint16)
    corner[:9, :9] = 1
    regions = Regions(corner[None], np.array([81]), np.array([0]))
    rigid = replace(PLAIN, zoom=0, shear=0)
    made = [episode(np.zeros(SIZE, np.uint8), regions, 0, "f0", n, rigid).query_mask == 1 for n in range(30)]
    assert min(mask.sum() for mask in made) >= 0.5 * 81
    never = replace(rigid, keep=1.1)
    assert np.array_equal(episode(corner, regions, 0, "f0", 3, never).query_mask, corner), "left where it is"


def test_every_region_comes_once_before_one_comes_again(drawn):
    picture, regions = drawn
    asked = [episode(picture, regions, 0, "f0", n, PLAIN).region for n in range(2 * len(regions))]
    assert sorted(asked[: len(regions)]) == list(range(1, len(regions) + 1)) and asked[: len(regions)] * 2 == asked
    other = [episode(picture, regions, 0, "f1", n, PLAIN).region for n in range(len(regions))]
    assert other != asked[: len(regions)]


def test_an_episode_depends_on_its_key_alone(drawn):
    picture, regions = drawn
    keys = [(0, "f0", 0), (0, "f0", len(regions)), (1, "f0", 0), (0, "f1", 0)]
    there = {key: episode(picture, regions, *key, PLAIN) for key in keys}
    back = {key: episode(picture, regions, *key, PLAIN) for key in reversed(keys)}
    for key in keys:
        assert np.array_equal(there[key].query, back[key].query)
        assert np.array_equal(there[key].query_mask, back[key].query_mask)
    assert len({made.query.tobytes() for made in there.values()}) == len(keys)


def test_another_layer_of_the_frame_moves_alike(drawn):
    picture, regions = drawn
    colour = np.stack([picture, 255 - picture, picture // 2], -1)
    a, b = (episode(x, regions, 0, "f0", 2, replace(PLAIN, **TONELESS)) for x in (picture, colour))
    assert np.array_equal(a.query_mask, b.query_mask) and a.region == b.region and b.query.shape == colour.shape
    assert np.abs(a.query.astype(int) - b.query[..., 0]).max() == 0
    assert np.abs(255 - a.query.astype(int) - b.query[..., 1]).max() <= 1


def test_tones_change_the_picture_and_not_the_mask(drawn):
    picture, regions = drawn
    made = [episode(picture, regions, 0, "f0", n, STILL) for n in range(0, 8 * len(regions), len(regions))]
    assert all(np.array_equal(x.query_mask, x.support_mask) for x in made)
    spreads = [x.query.std() / picture.std() for x in made]
    assert min(spreads) < 0.95 and max(spreads) > 1.05
    assert all(np.corrcoef(x.query.ravel(), picture.ravel())[0, 1] > 0.8 for x in made)


def test_each_tone_does_what_its_name_says(drawn):
    picture, regions = drawn
    level, spread = picture.mean(), picture.std()
    assert np.percentile(picture, 1) > 0 and np.percentile(picture, 99) < 255

    def toned(**tones):
        queries = [episode(picture, regions, 0, "f0", n, replace(STILL, **TONELESS | tones)).query for n in range(20)]
        return [(x.astype(float) - picture, x) for x in queries]

    assert all(abs(x.mean() - level) < 4 and abs(x.std() / spread - 1) < 0.4 for _, x in toned(gain=0.3))
    assert np.ptp([x.std() for _, x in toned(gain=0.3)]) > 0.2 * spread
    assert np.ptp([d.mean() for d, _ in toned(offset=0.3)]) > 0.3 * spread
    assert max(d.std() for d, _ in toned(offset=0.3)) < 0.1 * spread
    assert 0.1 * spread < max(d.std() for d, _ in toned(noise=0.25)) < 0.3 * spread
    assert np.ptp([d.mean() for d, _ in toned(gamma=0.35)]) > 0.3 * spread


@pytest.mark.parametrize("changes", [{"kinds": ("edges",)}, {"kinds": ()}, {"min_area": 0.3}, {"max_area": 1.5}])
def test_settings_that_do_not_fit_are_refused(changes):
    with pytest.raises(UsageError, match=r"superpixels, blobs|min_area < max_area"):
        replace(PLAIN, **changes)
