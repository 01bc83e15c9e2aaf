"""Losses by hand, against torch where torch is right, and where nothing is left to learn from."""

import math

import pytest
import torch
from torch.nn import functional

from models.losses import cross_entropy, dice, jaccard


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


# ---- jaccard


def looped_jaccard(logits, target, group, smooth):
    """Intersections and unions of a group are summed pixel by pixel before they are divided."""
    sums = {int(g): [0.0, 0.0] for g in group}
    shares = logits.softmax(1)[:, 1].tolist()
    for g, share, mask in zip(group.tolist(), shares, target.tolist(), strict=True):
        for row, truth in zip(share, mask, strict=True):
            for p, t in zip(row, truth, strict=True):
                if t != 255:
                    sums[g][0] += p * t
                    sums[g][1] += p + t - p * t
    return -sum(math.log((both + smooth) / (either + smooth)) for both, either in sums.values()) / len(sums)


@pytest.mark.parametrize("group", [[0, 0, 0, 0], [3, 1, 3, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("smooth", [1.0, 0.1])
def test_jaccard_equals_loops(group, smooth):
    draws = torch.Generator().manual_seed(0)
    logits, target = torch.randn(4, 2, 5, 7, generator=draws), torch.randint(0, 2, (4, 5, 7), generator=draws)
    target[torch.rand(4, 5, 7, generator=draws) < 0.3] = 255
    expected = looped_jaccard(logits, target, torch.tensor(group), smooth)
    found = jaccard(logits, target.to(torch.uint8), torch.tensor(group), smooth)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_jaccard_counts_a_group_once_however_many_episodes_it_has():
    """Three episodes of one class and one of another weigh as the two classes do."""
    logits, target = batch(classes=2, ignored=0.0)
    many = [torch.cat([x[:1], x[:1], x[:1], x[1:]]) for x in (logits, target)]
    each = [jaccard(x, t, torch.zeros(len(x), dtype=torch.long)) for x, t in
            ((many[0][:3], many[1][:3]), (logits[1:], target[1:]))]
    assert torch.allclose(jaccard(*many, torch.tensor([5, 5, 5, 2])), (each[0] + each[1]) / 2)


def test_jaccard_sends_no_gradient_from_ignored_pixels():
    logits, target = batch(classes=2)
    jaccard(logits, target, torch.tensor([0, 1])).backward()
    ignored = (target == 255).unsqueeze(1).expand_as(logits)
    assert (logits.grad[ignored] == 0).all() and logits.grad[~ignored].abs().min() > 0


def test_jaccard_is_zero_when_right_and_when_nothing_is_known():
    target = torch.zeros(2, 8, 8, dtype=torch.uint8)
    target[:, :4] = 1
    right = torch.stack([(target == 0) * 40.0, (target == 1) * 40.0], 1)
    assert jaccard(right, target, torch.tensor([0, 1])).item() == pytest.approx(0, abs=1e-5)
    assert jaccard(right.flip(1), target, torch.tensor([0, 1])).item() > 3
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    value = jaccard(logits, torch.full_like(target, 255), torch.tensor([0, 1]))
    value.backward()
    assert value.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
