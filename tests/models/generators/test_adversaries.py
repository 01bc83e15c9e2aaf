"""One iteration trains what it should and nothing else; a toy whose polarity has to be restored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.generators.adversaries import Adversaries, gradient_penalty
from models.generators.pictures import random_crop
from models.generators.settings import TranslateSettings

TINY = TranslateSettings(
    channels=(8, 16), layers=1, attention=False, latent=4, cycle_width=4, cycle_blocks=1, discriminator_channels=(4, 8),
    patch_width=4, patch_layers=1, crop=16, batch=2, iterations=10, structure_weight=0.1, short_side=None,
)  # fmt: skip


def batch(channels: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, channels, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("direction", "channels"), [("lightness", 1), ("rgb", 3)])
def test_every_weight_learns(direction, channels, both_ways):
    torch.manual_seed(0)
    trained = Adversaries(replace(TINY, both_ways=both_ways), direction)
    before = {name: p.clone() for name, p in trained.named_parameters()}
    losses = {name: loss.item() for name, loss in trained.iterate(batch(1), batch(channels), 0).items()}
    assert set(losses) == {"judge", "patch_judge", "r1", "fool", "patch_fool", "clean", "cycle", "structure"}
    assert all(np.isfinite(loss) for loss in losses.values())
    still = [name for name, p in trained.named_parameters() if torch.equal(p, before[name])]
    # what an instance norm follows, and a judge's constant, have no gradient
    assert all(name.endswith("bias") for name in still), still
    assert "r1" not in trained.iterate(batch(1), batch(channels), 1)


def test_both_ways_train_as_many_pairs():
    count = {ways: len(Adversaries(replace(TINY, both_ways=ways), "rgb").diffusive) for ways in (True, False)}
    assert count == {True: 2, False: 1}


def test_generators_are_not_touched_by_the_judges_step():
    trained = Adversaries(TINY, "lightness")
    clean = batch(1), batch(1, 1)
    guess = [net(x).detach() for net, x in zip(trained.cycle, reversed(clean), strict=True)]
    trained._judge(clean, guess, regularise=True)
    assert all(p.grad is None for p in trained.generator_parameters)
    before = [p.clone() for p in trained.judge_parameters]
    for p in trained.judge_parameters:
        p.grad = None
    trained._generate(clean, [net(x) for net, x in zip(trained.cycle, reversed(clean), strict=True)])
    assert all(p.grad is None for p in trained.judge_parameters)
    assert all(torch.equal(p, old) for p, old in zip(trained.judge_parameters, before, strict=True))


def test_r1_is_half_the_squared_gradient():
    """For a linear judge the gradient is its weight."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(8.0).reshape(1, 1, 2, 4))

        def forward(self, x, x_next, t):
            return (x * self.weight).sum((1, 2, 3))

    judge = Linear()
    penalty = gradient_penalty(judge, torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4), torch.zeros(3).long())
    assert penalty.item() == pytest.approx(float((torch.arange(8.0) ** 2).sum()))
    penalty.backward()
    torch.testing.assert_close(judge.weight.grad, 2 * judge.weight.detach())


def test_the_average_follows_slowly():
    torch.manual_seed(0)
    trained = Adversaries(replace(TINY, average=0.9), "lightness")
    old = [p.clone() for p in trained.translator.network.parameters()]
    trained.iterate(batch(1), batch(1, 1), 100)
    new = trained.diffusive[0].parameters()
    for before, now, average in zip(old, new, trained.translator.network.parameters(), strict=True):
        torch.testing.assert_close(average, 0.9 * before + 0.1 * now, atol=1e-6, rtol=1e-4)


def test_rates_fall_along_a_cosine():
    trained = Adversaries(TINY, "lightness")
    rates = []
    for step in (0, 5, 10):
        trained._set_rates(step)
        rates.append([group.param_groups[0]["lr"] for group in (trained.generator_optimiser, trained.judge_optimiser)])
    assert rates == [pytest.approx([1.6e-4, 1e-4]), pytest.approx([8.5e-5, 5.5e-5]), pytest.approx([1e-5, 1e-5])]


def drawn_shapes(rng: np.random.Generator) -> np.ndarray:
    """A visible toy: dark squares on a bright ground, uint8 [32,32]. Its infrared is the negative."""
    picture = np.full((32, 32), 215, np.uint8)
    for _ in range(2):
        top, left = rng.integers(2, 20, 2)
        picture[top : top + 9, left : left + 9] = 50
    return picture


def test_the_polarity_of_a_toy_is_restored():
    """Unpaired: bright-on-dark infrared and dark-on-bright pictures; four steps have to invert an unseen frame."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    settings = replace(
        TINY, cycle_width=6, discriminator_channels=(8, 16, 16), patch_width=16, patch_layers=2, patch_norm=False,
        batch=4, iterations=100, rate_generator=1e-3, rate_discriminator=2e-3, cycle_weight=0.3, average=0.95,
        structure_weight=0.0, both_ways=False,
    )  # fmt: skip
    trained = Adversaries(settings, "lightness")
    for step in range(25):
        infrared = [random_crop(255 - drawn_shapes(rng), 16, None, rng) for _ in range(settings.batch)]
        visible = [random_crop(drawn_shapes(rng), 16, None, rng) for _ in range(settings.batch)]
        trained.iterate(torch.stack(infrared), torch.stack(visible), step)
    unseen = [drawn_shapes(rng) for _ in range(4)]
    drawn = trained.translator.translate([255 - picture for picture in unseen], range(4))
    scores = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(unseen, drawn, strict=True)]
    assert min(scores) > 0.5, scores
