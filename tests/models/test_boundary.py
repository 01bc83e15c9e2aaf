"""SABR with a segmenter that knows the truth, one that lies, and the real tiny SAM."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from models.boundary import BoundarySettings, ask, band, band_width, grown, innermost, sharpen
from models.errors import UsageError
from models.pseudolabels import IGNORE, find_regions
from models.sam import Frame, Masks, OriginalSAM
from tests.models import sams
from tests.models.test_pseudolabels import LABELS, scene

QUICK = settings(max_examples=40)
SETTINGS = BoundarySettings(min_area=0, band=20)
PICTURE = np.zeros((96, 96, 3), np.uint8)


class Oracle:
    """Answers each box with given masks: one function of (box number) -> bool [H, W] or logits; its own quality."""

    def __init__(self, answer, quality=0.9):
        self.answer, self.quality, self.calls = answer, quality, []

    def segment(self, pictures, prompts, masks=3):
        self.calls.append([len(asked.boxes) for asked in prompts])
        found = []
        for picture, asked in zip(pictures, prompts, strict=True):
            size = picture.shape[:2]
            drawn = [self.logits(n, size) for n in range(len(asked.boxes))]
            logits = torch.from_numpy(np.stack(drawn)).float()[:, None].repeat(1, masks, 1, 1)
            quality = torch.full((len(drawn), masks), self.quality)
            logits[:, 1:], quality[:, 1:] = -1, 0
            found.append(Masks(logits, quality, Frame(size, size, max(size))))
        return found

    def logits(self, n, size):
        answer = np.asarray(self.answer(n))
        return np.where(answer, 5.0, -5.0) if answer.dtype == bool else answer


def one(label, answer, chosen=SETTINGS, quality=0.9):
    (found,) = sharpen([PICTURE[: label.shape[0], : label.shape[1]]], [label], Oracle(answer, quality), chosen)
    return found


def square(top=30, left=30, side=20, class_id=1, size=96):
    label = np.zeros((size, size), np.uint8)
    label[top : top + side, left : left + side] = class_id
    return label


# ---- the band


@QUICK
@given(LABELS, st.integers(1, 3))
def test_the_band_is_where_a_window_holds_two_labels(label, width):
    """Against the definition; the reach of a region is clamped by its size."""
    regions = find_regions(label)
    found = band(label, regions, width)
    reach = np.minimum(width, np.sqrt(regions.area) / 4).astype(int)[regions.index]
    for row, column in np.ndindex(label.shape):
        w = reach[row, column]
        window = label[max(row - w, 0) : row + w + 1, max(column - w, 0) : column + w + 1]
        assert found[row, column] == (w > 0 and len(np.unique(window)) > 1)


def test_the_band_lies_on_both_sides_and_leaves_a_core():
    label = square()
    found = band(label, find_regions(label), 4)
    assert found[26:34, 40].all() and not found[25, 40] and not found[34:46, 40].any()
    thin = np.zeros((96, 96), np.uint8)
    thin[40:42, 10:60] = 1
    assert band(thin, find_regions(thin), 8)[40:42].any()
    assert not band(square(side=3), find_regions(square(side=3)), 8)[30:33, 30:33].any()


def test_the_band_scales_with_the_frame():
    assert band_width((473, 473), BoundarySettings()) == 5 and band_width((946, 946), BoundarySettings()) == 10
    assert band_width((40, 40), BoundarySettings()) == 1


# ---- the prompts


def test_boxes_are_tight_and_grown_and_points_lie_deep_inside():
    label = square(30, 50, 20)
    asked = ask(label, find_regions(label), SETTINGS)
    assert asked.prompts.boxes.tolist() == [[48, 28, 72, 52]]
    (x, y) = asked.prompts.points[0, 0]
    assert 58 <= x <= 61 and 38 <= y <= 41 and asked.prompts.point_labels.tolist() == [[1]]
    assert grown(np.array([[0.0, 0, 96, 96]]), (96, 96), 0.05).tolist() == [[0, 0, 96, 96]]


def test_a_bent_region_has_its_points_on_the_right_side():
    label = np.zeros((96, 96), np.uint8)
    label[20:60, 20:30] = label[50:60, 20:60] = 2
    asked = ask(label, find_regions(label), BoundarySettings(min_area=0, points="pos_neg"))
    ((inside, outside),), labels = asked.prompts.points.astype(int), asked.prompts.point_labels
    assert label[inside[1], inside[0]] == 2 and label[outside[1], outside[0]] == 0 and labels.tolist() == [[1, 0]]
    assert 30 < outside[0] < 62 and 18 < outside[1] < 50


def test_innermost_counts_the_border_as_outside():
    assert innermost(np.ones((9, 9), bool)).tolist() == [4, 4]


def test_scope_size_and_class_choose_who_is_asked():
    label = square()
    label[70:73, 70:73], label[5:25, 5:25], label[80:90, 5:25], label[0, 90:] = 1, 2, 2, 255

    def boxes(**changes):
        chosen = BoundarySettings(**{"min_area": 64 * 24, **changes})  # 64 pixels here
        return ask(label, find_regions(label), chosen).class_id.tolist()

    assert boxes() == [2, 1, 2] and boxes(min_area=0) == [2, 1, 1, 2]
    assert boxes(scope=(1,)) == [1] and boxes(per="class") == [1, 2] and boxes(scope="all") == [2, 1, 2]
    joined = ask(label, find_regions(label), BoundarySettings(per="class", min_area=64 * 24))
    assert joined.box[1].tolist() == [5, 5, 90, 25] and joined.area[1] == 400 + 200


# ---- the rules


def test_an_object_grows_to_its_outline_and_nothing_else_moves():
    """Spec §3.1, toy run: 20 x 20 of an object of 24 x 24 are labelled."""
    label, truth = square(), square(28, 28, 24)
    found = one(label, lambda n: truth > 0)
    assert (found.label == truth).all()
    assert found.changed == pytest.approx((24**2 - 20**2) / 96**2) and found.table["accepted"].tolist() == [True]


def test_an_object_shrinks_to_its_outline_and_the_rest_is_background():
    label, truth = square(30, 30, 24), square(32, 32, 20)
    assert (one(label, lambda n: truth > 0).label == truth).all()


def test_where_the_band_has_no_background_what_is_denied_becomes_free():
    label = np.full((96, 96), 2, np.uint8)
    label[30:54, 30:54] = 1
    truth = square(32, 32, 20) > 0
    found = one(label, lambda n: truth, BoundarySettings(min_area=0, band=20, scope=(1,)))
    assert (found.label[30:32, 30:54] == IGNORE).all() and (found.label[label == 2] == 2).all()


def test_unsure_pixels_keep_their_label():
    label, truth = square(30, 30, 24), square(32, 32, 20) > 0
    found = one(label, lambda n: np.where(truth, 5.0, -1.0))
    assert (found.label == label).all() and found.table["accepted"][0]


@QUICK
@given(LABELS, st.integers(0, 1000), st.sampled_from(["component", "class"]), st.sampled_from([1.0, 5.0, 30.0]))
def test_nothing_outside_the_band_is_ever_written(label, seed, per, half):
    chosen = BoundarySettings(band=half * 30, min_area=0, min_iou=0.0, min_quality=0.0, per=per)
    rng = np.random.default_rng(seed)
    noise = Oracle(lambda n: rng.normal(0, 4, label.shape))
    (found,) = sharpen([np.zeros(label.shape, np.uint8)], [label], noise, chosen)
    edge = band(label, find_regions(label), band_width(label.shape, chosen))
    outside = ~edge & (label != IGNORE)
    assert (found.label[outside] == label[outside]).all()
    assert set(np.unique(found.label)) <= {0, IGNORE, *np.unique(label).tolist()}
    assert found.label.dtype == np.uint8


def test_free_pixels_are_filled_wherever_a_mask_claims_them():
    label, truth = square(), square(20, 20, 40) > 0
    label[(square(20, 20, 40) > 0) & (label == 0)] = IGNORE
    found = one(label, lambda n: truth, BoundarySettings(min_area=0, band=20, box_grow=0.6, min_iou=0.2))
    assert (found.label[truth] == 1).all() and found.ignored == 0


def test_the_stronger_claim_wins_then_the_smaller_region_then_the_lower_class():
    label = np.zeros((96, 96), np.uint8)
    label[20:40, 20:40], label[20:40, 44:64] = 2, 1
    gap = (slice(20, 40), slice(40, 44))

    def both(first, second):
        def answer(n):
            logits = np.where(label == (2, 1)[n], 5.0, -5.0)
            logits[gap] = (first, second)[n]
            return logits
        return one(label, answer, BoundarySettings(min_area=0, band=30)).label[gap]

    assert (both(4.0, 3.0) == 2).all() and (both(3.0, 4.0) == 1).all() and (both(3.0, 3.0) == 1).all()
    label[38:40, 20:40] = 0
    assert (both(3.0, 3.0)[:18] == 2).all(), "the smaller one is in front"


def test_masks_that_do_not_fit_their_region_are_rejected():
    label = square()
    everything, nothing = np.ones((96, 96), bool), np.zeros((96, 96), bool)
    part = square(30, 30, 8) > 0
    for answer in (everything, nothing, part):
        found = one(label, lambda n, answer=answer: answer)
        assert (found.label == label).all() and found.table["accepted"].tolist() == [False] and found.changed == 0
    doubted = one(label, lambda n: square(28, 28, 24) > 0, quality=0.6)
    assert (doubted.label == label).all()


def test_the_rule_of_sam_wsss_takes_a_part_or_a_scene():
    chosen = BoundarySettings(min_area=0, band=20, accept="wsss")
    label = square()
    everything, part, elsewhere = np.ones((96, 96), bool), square(30, 30, 8) > 0, square(60, 60, 9) > 0
    for answer, taken in ((everything, True), (part, True), (elsewhere, False)):
        assert one(label, lambda n, answer=answer: answer, chosen).table["accepted"].tolist() == [taken]


def test_of_three_masks_the_one_that_fits_and_is_sure_is_taken():
    label, truth = square(), square(28, 28, 24) > 0

    class Three(Oracle):
        def segment(self, pictures, prompts, masks=3):
            (found,) = super().segment(pictures, prompts, masks)
            wrong = np.where(square(70, 70, 8) > 0, 5.0, -5.0)
            logits = torch.from_numpy(np.stack([wrong, np.where(truth, 5.0, -5.0), np.ones((96, 96))])).float()[None]
            return [Masks(logits, torch.tensor([[0.95, 0.85, 0.9]]), found.frame)]

    (found,) = sharpen([PICTURE], [label], Three(lambda n: truth), SETTINGS)
    assert (found.label == truth).all() and found.table["quality"][0] == pytest.approx(0.85)


# ---- several pictures


def test_pictures_share_one_call_and_empty_ones_are_not_asked():
    labels = [square(), np.zeros((96, 96), np.uint8), scene(0)]
    oracle = Oracle(lambda n: square(28, 28, 24) > 0)
    found = sharpen([PICTURE] * 3, labels, oracle, SETTINGS)
    assert len(oracle.calls) == 1 and len(oracle.calls[0]) == 2
    assert (found[1].label == 0).all() and len(found[1].table) == 0
    assert (found[0].label == (square(28, 28, 24) > 0)).all()
    nobody = Oracle(lambda n: None)
    assert sharpen([PICTURE], [labels[1]], nobody, SETTINGS)[0].changed == 0 and nobody.calls == []


def test_chunks_change_nothing():
    label = scene(6)
    truth = [ndimage.binary_dilation(label == k, iterations=2) for k in (1, 2, 3)]
    results = [one(label, lambda n: truth[n % 3], BoundarySettings(min_area=0, band=20, chunk=chunk, min_iou=0)).label
               for chunk in (1, 2, 64)]
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


def test_the_real_sam_runs_through():
    """Random weights: the masks are noise, the way is real, and nothing outside the band may move."""
    labels = [scene(0), scene(1)[:64]]
    pictures = [np.random.default_rng(n).integers(0, 256, (*x.shape, 3), dtype=np.uint8) for n, x in enumerate(labels)]
    chosen = BoundarySettings(min_area=0, band=15, min_quality=-10, min_iou=0.0)
    found = sharpen(pictures, labels, OriginalSAM(sams.original()), chosen)
    for label, one_found in zip(labels, found, strict=True):
        edge = band(label, find_regions(label), band_width(label.shape, chosen))
        assert (one_found.label[~edge] == label[~edge]).all()
        assert len(one_found.table) == (find_regions(label).class_id > 0).sum()
        assert one_found.table["accepted"].all()


@pytest.mark.parametrize("wrong", [dict(points="many"), dict(accept="all"), dict(per="pixel")])
def test_settings_that_cannot_be_say_what_can(wrong):
    with pytest.raises(UsageError, match="choose one of"):
        BoundarySettings(**wrong)
