"""The small SAM: a real Sam, fitted on base objects alone, saved and opened like the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.boundary import BoundarySettings, sharpen
from models.datasets.toy import Toy
from models.errors import UsageError
from models.fitting import average_of
from models.sam import OriginalSAM, Prompts, open_segmenter
from models.small_sam import (
    SmallSAMSettings,
    build_small_sam,
    fit_sam,
    mask_losses,
    sam_fitting,
    sam_losses,
    sample_objects,
    save_sam,
)

TINY = SmallSAMSettings(side=64, width=8, channels=16, blocks=2, steps=50, batch=4, rate=5e-3, min_area=30)


@pytest.fixture(scope="module")
def scenes():
    toy = Toy(size=(48, 64), train=10, test=0)
    read = [toy.read(item) for item in toy.items()]
    return [picture.infrared for picture in read], [picture.label for picture in read]


@pytest.fixture(scope="module")
def fitted(scenes):
    sam, told = build_small_sam(TINY), []
    fit_sam(sam, sam_fitting(sam, TINY), *scenes, range(1, 10), TINY, lambda step, numbers: told.append(numbers))
    return sam, told


def test_the_loss_falls_within_fifty_steps(fitted):
    _, told = fitted
    assert average_of(told[-10:], "outline") < 0.85 * average_of(told[:5], "outline")
    assert average_of(told[-10:], "iou") > average_of(told[:5], "iou")


def test_it_is_a_real_sam(fitted):
    from segment_anything.modeling import Sam

    sam, _ = fitted
    assert isinstance(sam, Sam) and sam.image_encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 8, 8)


def test_a_saved_one_answers_the_same(fitted, scenes, tmp_path):
    sam, _ = fitted
    save_sam(tmp_path / "sam", sam, TINY)
    asked = Prompts(np.array([[5.0, 5, 40, 40]]), np.array([[[20.0, 20]]]), np.ones((1, 1), np.int64))
    both = OriginalSAM(sam), open_segmenter(str(tmp_path / "sam"))
    first, again = (one.segment(scenes[0][:1], [asked])[0] for one in both)
    assert torch.equal(first.logits, again.logits) and first.logits.shape == (1, 3, 32, 32)


def test_it_serves_the_boundary_stage(fitted, scenes):
    found = sharpen(scenes[0][:2], scenes[1][:2], OriginalSAM(fitted[0]), BoundarySettings(min_area=0))
    assert all(len(one.table) for one in found)


# ---- what it sees


def test_objects_are_of_base_classes_only(scenes):
    for n, label in enumerate(scenes[1]):
        objects = sample_objects(label, (1, 2, 3), TINY, n)
        assert len(objects.masks) <= TINY.objects
        for box, (x, y), mask in zip(objects.boxes, objects.points, objects.masks, strict=True):
            assert mask[int(y), int(x)] and set(np.unique(label[mask])) <= {1, 2, 3}
            rows, columns = np.where(mask)
            sides = np.array([np.ptp(columns) + 1, np.ptp(rows) + 1] * 2)
            off = np.abs(box - [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / sides
            assert off.max() <= TINY.jitter + 1e-9


def test_boxes_are_off_by_what_the_key_says(scenes):
    label = scenes[1][0]
    draws = [sample_objects(label, range(1, 13), TINY, key).boxes for key in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(np.sort(draws[0], 0), np.sort(draws[2], 0))
    exact = sample_objects(label, range(1, 13), replace(TINY, jitter=0.0), 0)
    assert (exact.boxes == exact.boxes.round()).all()


def test_a_picture_without_objects_costs_nothing(scenes):
    sam = build_small_sam(TINY)
    nothing = sample_objects(np.zeros_like(scenes[1][0]), (1,), TINY, 0)
    assert nothing.boxes.shape == (0, 4) and nothing.masks.shape == (0, 48, 64)
    losses = sam_losses(sam, scenes[0][:1], [nothing])
    losses["loss"].backward()
    assert losses["loss"].detach() == 0


# ---- the loss


def test_the_best_of_three_masks_counts():
    masks = torch.zeros(1, 8, 8)
    masks[:, 2:6, 2:6] = 1
    right, wrong = masks * 20 - 10, 10 - masks * 20
    logits = torch.stack([wrong[0], right[0], wrong[0]])[None]
    losses = mask_losses(logits, torch.tensor([[0.0, 1.0, 0.0]]), masks)
    assert losses["outline"] < 0.01 and losses["quality"] < 1e-6 and losses["iou"] == 1
    alone = mask_losses(logits[:, :1], torch.tensor([[1.0]]), masks)
    assert alone["outline"] > 10 and alone["quality"] == 1 and alone["iou"] == 0


def test_sides_that_do_not_fit_the_stride_are_told():
    with pytest.raises(UsageError, match="multiples of 8"):
        build_small_sam(replace(TINY, side=60))
