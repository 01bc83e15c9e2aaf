"""Weights that act, and the released ones that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.errors import UsageError
from models.fusers.weighting import KINDS, Weighting, dynamic_weights


def run(weighting: Weighting, steps: int, losses, shared: nn.Parameter | None = None) -> list[float]:
    for step in range(steps):
        values = losses(step)
        weighting(dict(zip(weighting.names, values, strict=True)), shared)
    return weighting.weights.tolist()


def test_the_released_rule_is_inert_and_ours_is_not():
    ratios = torch.tensor([3.0, 0.3])
    assert dynamic_weights(ratios, 1000).tolist() == pytest.approx([1.0013, 0.9987], abs=1e-4)
    assert dynamic_weights(torch.tensor([10.0, 0.1]), 1000).tolist() == pytest.approx([1.005, 0.995], abs=1e-3)
    assert dynamic_weights(ratios, 2).tolist() == pytest.approx([1.588, 0.412], abs=1e-3)
    assert dynamic_weights(ratios, 2, (0.5, 1.5)).tolist() == [1.5, 0.5]


def test_the_loss_that_falls_slower_gains():
    weighting = Weighting(("a", "b"), "dynamic", window=10)
    falling = lambda step: torch.tensor([1.0, 0.9**step])  # noqa: E731
    assert run(weighting, 10, falling) == [1, 1], "one window says nothing yet"
    slow, fast = run(weighting, 40, falling)
    assert slow > 1.1 and fast < 0.9 and slow + fast == pytest.approx(2)


def test_noise_of_single_batches_moves_little():
    torch.manual_seed(0)
    weights = run(Weighting(("a", "b"), "dynamic", window=100), 400, lambda _: 1 + 0.5 * torch.rand(2))
    assert weights == pytest.approx([1, 1], abs=0.05)


def test_uncertainty_scales_down_the_larger_loss():
    weighting = Weighting(("a", "b"), "uncertainty")
    optimiser = torch.optim.SGD(weighting.parameters(), 0.1)
    for _ in range(300):
        optimiser.zero_grad()
        weighting({"a": torch.tensor(4.0), "b": torch.tensor(0.5)}).backward()
        optimiser.step()
    assert weighting.weights.tolist() == pytest.approx([0.25, 2.0], rel=0.05), "1 / L minimises e^-s L + s"


def test_gradnorm_brings_the_gradients_together():
    shared = nn.Parameter(torch.ones(3))
    weighting = Weighting(("a", "b"), "gradnorm", rate=0.02)
    weights = run(weighting, 300, lambda _: torch.stack([8 * shared.sum(), shared.sum()]), shared)
    assert sum(weights) == pytest.approx(2)
    assert weights[0] * 8 == pytest.approx(weights[1], rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_can_be_descended_and_the_state_restored(kind):
    shared = nn.Parameter(torch.tensor(2.0))
    weighting = Weighting(("a", "b"), kind, window=2)
    losses = lambda step: torch.stack([shared**2 / (step + 1), 3 * shared])  # noqa: E731
    run(weighting, 5, losses, shared)
    total = weighting(dict(zip("ab", losses(5), strict=True)), shared)
    total.backward()
    assert shared.grad is not None and torch.isfinite(shared.grad)
    again = Weighting(("a", "b"), kind, window=2)
    again.load_state_dict(weighting.state_dict())
    assert again.factors.keys() == {"weight_a", "weight_b"}
    assert again.weights.tolist() == weighting.weights.tolist()


def test_fixed_is_the_plain_sum():
    weighting = Weighting(("a", "b"), "fixed")
    assert weighting({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}) == 5
    with pytest.raises(UsageError, match="fixed, dynamic"):
        Weighting(("a", "b"), "dwa")
