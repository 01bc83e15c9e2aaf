"""Crops that keep their layers together, and one step of an optimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.fusers.training import (
    Pairs,
    at_rest,
    average_into,
    cosine_rate,
    crop_pair,
    descend,
    linear_rate,
    set_rate,
    stack_pairs,
    with_initial_rates,
)


def layers(height: int = 40, width: int = 50) -> dict:
    """Every layer tells the place: infrared the row, visible the column, the label both."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    label = (rows + columns).astype(np.uint8)
    return {"infrared": rows, "visible": np.repeat(columns[..., None], 3, -1), "label": label}


@pytest.mark.parametrize("seed", range(6))
def test_all_layers_take_the_same_place(seed):
    cut = crop_pair(layers(), 16, (1.0, 1.0), np.random.default_rng(seed))
    assert cut.infrared.shape == (1, 16, 16) and cut.visible.shape == (3, 16, 16) and cut.label.shape == (16, 16)
    place = (255 * (cut.infrared[0] + cut.visible[0])).round().long()
    assert torch.equal(place, cut.label) and cut.label.dtype == torch.long


def test_crops_differ_by_seed_flip_and_scale():
    cuts = [crop_pair(layers(), 16, (0.5, 2.0), np.random.default_rng(seed)) for seed in range(20)]
    assert len({cut.visible.sum().item() for cut in cuts}) == 20
    steps = [cut.visible[0, 8].diff().sum().item() for cut in cuts]
    assert min(steps) < 0 < max(steps), "some are flipped"
    assert max(map(abs, steps)) > 2 * min(map(abs, steps)), "some are larger"
    assert all(set(cut.label.unique().tolist()) <= {*range(88), 255} for cut in cuts)


def test_a_frame_smaller_than_the_crop_is_filled_up():
    cut = crop_pair(layers(10, 12), 16, (1.0, 1.0), np.random.default_rng(1))
    assert cut.infrared.shape == (1, 16, 16)
    assert (cut.label == 255).sum() == 16 * 16 - 10 * 12
    assert torch.equal(cut.infrared[0, -1], cut.infrared[0, 9])


def test_a_batch_has_what_its_items_have():
    items = [crop_pair(layers(), 16, (1.0, 1.0), np.random.default_rng(i)) for i in range(3)]
    batch = stack_pairs(items)
    assert batch.infrared.shape == (3, 1, 16, 16) and batch.label.shape == (3, 16, 16) and batch.mask_visible is None
    assert isinstance(batch.to("cpu"), Pairs)


def test_rates():
    assert [linear_rate(step, 100) for step in (0, 4, 99)] == pytest.approx([0.2, 0.96, 0.01])
    assert [cosine_rate(step, 10, 0.1) for step in (0, 5, 10, 20)] == pytest.approx([1, 0.55, 0.1, 0.1])
    weight = nn.Parameter(torch.ones(1))
    optimiser = with_initial_rates(torch.optim.SGD([weight], 0.5))
    set_rate(optimiser, 0.1), set_rate(optimiser, 0.2)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_step_is_clipped_per_optimiser():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimisers = [torch.optim.SGD([p], 1.0) for p in (a, b)]
    for _ in range(2):  # the second step would be twice as long if gradients were not reset
        descend(100 * a.sum() + 0.5 * b.sum(), *optimisers)
    assert a.item() == pytest.approx(-2, abs=1e-4) and b.item() == pytest.approx(-1, abs=1e-4)


def test_at_rest_nothing_learns_but_gradients_pass():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    net[0].bias.requires_grad_(False)
    x = torch.randn(4, 2, requires_grad=True)
    with at_rest(net):
        assert not net.training
        net(x).sum().backward()
    assert x.grad is not None and net[0].weight.grad is None and net[1].num_batches_tracked == 0
    assert net.training and net[0].weight.requires_grad and not net[0].bias.requires_grad


def test_averages():
    old, new = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(new.weight, 3.0), new.running_mean.fill_(7)
    average_into(old, new, 0.75)
    assert old.weight.tolist() == [1.5, 1.5] and old.running_mean.tolist() == [7, 7]
