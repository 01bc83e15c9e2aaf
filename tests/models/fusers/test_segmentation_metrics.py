"""Three protocols, three numbers, one hand-made matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from models.errors import UsageError
from models.fusers.segmentation_metrics import all_protocols, class_iou, confusion, mean_iou

# background, car, bicycle (never true, predicted once), pole (nowhere)
COUNTS = torch.tensor([[8, 1, 1, 0], [2, 6, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_each_protocol_has_its_value():
    background, car = 8 / 12, 6 / 9
    assert mean_iou(COUNTS, "all") == pytest.approx((background + car + 0) / 3)
    assert mean_iou(COUNTS, "fg") == pytest.approx((car + 0) / 2)
    assert mean_iou(COUNTS, "present") == pytest.approx(car)
    table = all_protocols(COUNTS, ("background", "car", "bicycle", "pole"))
    assert table["iou_car"] == pytest.approx(car) and table["iou_bicycle"] == 0 and math.isnan(table["iou_pole"])
    assert table["miou_fg"] == mean_iou(COUNTS, "fg")


def test_counts_agree_with_torchmetrics_and_leave_out_what_is_unknown():
    torch.manual_seed(0)
    prediction, label = torch.randint(0, 4, (2, 3, 9, 11))
    label[:, :2] = 255
    counts = confusion(prediction, label, 4)
    assert counts.sum() == (label != 255).sum()
    theirs = MulticlassJaccardIndex(4, average="none", ignore_index=255)(prediction, label)
    torch.testing.assert_close(class_iou(counts).float(), theirs)
    halves = confusion(prediction[:1], label[:1], 4) + confusion(prediction[1:], label[1:], 4)
    assert torch.equal(counts, halves), "one matrix over the whole set"


def test_what_does_not_fit_is_told():
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(UsageError, match="differ in size"):
        confusion(label[..., 1:], label, 2)
    with pytest.raises(UsageError, match="ids up to 7, but 2 classes"):
        confusion(label + 7, label, 2)
    with pytest.raises(UsageError, match="all, fg, present"):
        mean_iou(COUNTS, "mean")
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.long), "fg"))
