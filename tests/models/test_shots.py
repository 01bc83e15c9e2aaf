"""Lists of supports: the same everywhere, large enough, and never asked about."""

import pytest

from models.errors import UsageError
from models.shots import PUBLISHED_PIXELS, draw_supports, remaining_queries
from tests.models.drawn import drawn_frames


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"))


NOVEL = (1, 2, 3)


def test_supports_hold_their_class_and_are_the_same_every_time(frames):
    found = draw_supports(frames, NOVEL, 2, 5, min_pixels=60)
    assert set(found) == set(NOVEL) and found == draw_supports(frames, NOVEL[::-1], 2, 5, min_pixels=60)
    assert all(frames.pixels(id)[k] >= 60 and frames.split(id) == "train" for k, ids in found.items() for id in ids)
    lists = {tuple(draw_supports(frames, NOVEL, 2, seed, min_pixels=60).values()) for seed in range(6)}
    assert len(lists) > 3


def test_five_shots_begin_with_the_one_shot(frames):
    one, five = (draw_supports(frames, (1,), shots, 0, min_pixels=60)[1] for shots in (1, 5))
    assert five[:1] == one and len(five) == 5


def test_too_few_frames_are_repeated_and_none_is_an_error(frames):
    counts = sorted((frames.pixels(id).get(1, 0) for id in frames.ids("train")), reverse=True)
    found = draw_supports(frames, (1,), 5, 0, min_pixels=counts[1])[1]
    assert len(found) == 5 and len(set(found)) == 2 and found[0] == found[2]
    with pytest.raises(UsageError, match=f"no train frame with {PUBLISHED_PIXELS} pixels"):
        draw_supports(frames, (1,), 1, 0)


def test_alone_means_without_other_novel_classes(frames):
    found = draw_supports(frames, (1, 2), 4, 0, min_pixels=60, alone=True)
    assert all(not set(frames.pixels(id)) & {1, 2} - {k} for k, ids in found.items() for id in ids)


def test_supports_are_no_queries(frames):
    shown = [k for k in range(1, 13) if any(k in frames.pixels(id) for id in frames.ids("test"))][:2]
    found = draw_supports(frames, shown, 1, 0, min_pixels=1, split="test")
    queries = remaining_queries(frames, found)
    taken = {id for ids in found.values() for id in ids}
    assert not taken & set(queries) and taken | set(queries) == set(frames.ids("test"))
    assert remaining_queries(frames, draw_supports(frames, (1,), 1, 0, 10)) == frames.ids("test")
