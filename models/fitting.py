"""What a small network is fitted with: one optimiser, a cosine rate, a running average, and a state to resume from.

The loops of the toy foundation models call `Fitting.step` once a step; what a batch holds is a pure function of the
step (`batch_indices`), so that a run that goes on from a checkpoint is the run that was not cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.episode import number
from models.errors import StageFailed

Tell = Callable[[int, dict[str, float]], None]


class Fitting:
    """Modules under one AdamW. rate: the largest; it rises over the first 2 % of the steps and falls as a cosine.

    average: decay of the running average of all weights, warmed up over the first steps; 0 keeps none.
    """

    def __init__(self, modules: Mapping[str, nn.Module], rate: float, steps: int, average: float = 0.0) -> None:
        self.modules, self.rate, self.steps, self.decay = nn.ModuleDict(modules), rate, steps, average
        self.optimiser = torch.optim.AdamW(self.modules.parameters(), rate, weight_decay=1e-3)
        self.averaged = [p.detach().clone() for p in self.modules.parameters()] if average else []
        self.done = 0

    def rate_at(self, step: int) -> float:
        rising = min((step + 1) / max(0.02 * self.steps, 1), 1.0)
        return self.rate * rising * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))

    def step(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """One step down `losses["loss"]`; returns all losses as numbers. Raises StageFailed at a loss of NaN."""
        numbers = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(numbers["loss"]):
            raise StageFailed(f"The loss is {numbers['loss']} at step {self.done}; lower the rate and run again.")
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_at(self.done)
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        self._follow()
        return numbers

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.decay, (1 + self.done) / (10 + self.done))
        for kept, now in zip(self.averaged, self.modules.parameters(), strict=False):
            kept.lerp_(now, 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the modules, at the end."""
        for kept, now in zip(self.averaged, self.modules.parameters(), strict=False):
            now.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything that another Fitting of the same modules needs to go on."""
        return {"modules": self.modules.state_dict(), "optimiser": self.optimiser.state_dict(),
                "averaged": self.averaged, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.modules.load_state_dict(state["modules"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.averaged, self.done = [x.clone() for x in state["averaged"]], state["done"]


def run(fitting: Fitting, losses_at: Callable[[int], Mapping[str, Tensor]], tell: Tell | None = None) -> None:
    """All steps that are left. losses_at: step -> losses; tell: hears each step's numbers, and may save a state."""
    fitting.modules.train()
    for step in range(fitting.done, fitting.steps):
        numbers = fitting.step(losses_at(step))
        if tell is not None:
            tell(step, numbers)
    fitting.modules.eval()


def batch_indices(total: int, batch: int, *key: object) -> np.ndarray:
    """`batch` places below `total`, decided by `key`; without repeats where that is possible."""
    return np.random.default_rng(number(*key)).choice(total, batch, replace=batch > total)


def average_of(numbers: Iterable[Mapping[str, float]], name: str = "loss") -> float:
    return float(np.mean([one[name] for one in numbers]))
