"""Losses by hand, against torch where torch is right, and where nothing is left to learn from."""

import pytest
import torch
from torch.nn import functional

from models.losses import cross_entropy, dice


def batch(classes=3, ignored=0.3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 5, 7, generator=draws, requires_grad=True)
    target = torch.randint(0, classes, (2, 5, 7), generator=draws)
    target[torch.rand(2, 5, 7, generator=draws) < ignored] = 255
    return logits, target.to(torch.uint8)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_cross_entropy_equals_torch_where_pixels_are_known(weight):
    logits, target = batch()
    expected = functional.cross_entropy(logits, target.long(), weight, ignore_index=255)
    assert torch.allclose(cross_entropy(logits, target, weight), expected)


def test_ignored_pixels_change_nothing():
    logits, target = batch(classes=2)
    moved = logits.detach() + 50 * (target == 255).unsqueeze(1) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    for loss in (cross_entropy, dice):
        assert torch.allclose(loss(moved, target), loss(logits, target))


@pytest.mark.parametrize("loss", [cross_entropy, dice, lambda x, t: cross_entropy(x, t, torch.tensor([1.0, 2.0]))])
def test_a_batch_without_known_pixels_is_zero_with_a_gradient(loss):
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_dice_by_hand():
    logits = torch.zeros(1, 2, 1, 4)  # probability 1/2 everywhere
    target = torch.tensor([[[1, 0, 0, 255]]])
    assert dice(logits, target, smooth=1.0).item() == pytest.approx(1 - (2 * 0.5 + 1) / (1.5 + 1 + 1))


def test_dice_is_zero_when_right_and_near_one_when_wrong():
    target = torch.zeros(1, 16, 16, dtype=torch.uint8)
    target[:, :8] = 1
    right = torch.stack([(target == 0) * 40.0, (target == 1) * 40.0], 1)
    assert dice(right, target).item() == pytest.approx(0, abs=1e-6)
    assert dice(right.flip(1), target).item() > 0.99


def test_dice_weighs_samples_alike_whatever_their_size():
    """A missed object of 4 px costs as much as a missed one of 128 px; over the batch it would vanish."""
    target = torch.zeros(2, 16, 16, dtype=torch.uint8)
    target[0, :8], target[1, :2, :2] = 1, 1
    found = torch.stack([(target == 0) * 40.0, (target == 1) * 40.0], 1)
    missed = found.clone()
    missed[1] = torch.tensor([40.0, 0.0]).view(2, 1, 1)
    assert dice(missed, target).item() > 0.35


def test_a_sample_without_known_pixels_is_left_out():
    logits, target = batch(classes=2, ignored=0.0)
    both = target.clone()
    both[1] = 255
    assert torch.allclose(dice(logits, both), dice(logits[:1], target[:1]))


def test_half_precision_logits_give_a_float32_loss():
    logits, target = batch(classes=2)
    for loss in (cross_entropy, dice):
        value = loss(logits.bfloat16(), target)
        assert value.dtype == torch.float32 and torch.allclose(value, loss(logits, target), atol=0.02)


def test_a_nan_is_not_hidden():
    logits, target = batch(classes=2, ignored=0.0)
    logits = logits.detach().clone()
    logits[0, 0, 0, 0] = float("nan")
    assert cross_entropy(logits, target).isnan() and dice(logits, target).isnan()
