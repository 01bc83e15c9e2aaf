"""How several losses share one step: fixed weights, or weights that follow the losses.

    fixed         as given
    dynamic       dynamic weight averaging (Liu, Johns and Davison 2019): J softmax(r / T) of the ratios r of each loss
                  to what it was. SegMiF's released rule takes single batches and T = 1000, with which the weights
                  stay within 0.5 % of 1 even for ratios of 10 and 0.1; here the ratios are of averaged losses, a
                  window apart, with T = 2, and the weights are kept in 0.5..1.5
    uncertainty   learnt variances (Kendall, Gal and Cipolla 2018): Σ exp(-s_j) L_j + s_j
    gradnorm      weights that bring the gradients of the losses at shared weights to like norms, more for the losses
                  that learn slowly (Chen et al. 2018)

Legend: J losses, in the order of `names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.errors import UsageError

KINDS = ("fixed", "dynamic", "uncertainty", "gradnorm")


def dynamic_weights(ratios: Tensor, temperature: float, limits: tuple[float, float] = (0.0, float("inf"))) -> Tensor:
    """J softmax(r / T) of ratios [J], cut to `limits`."""
    return (len(ratios) * (ratios / temperature).softmax(0)).clamp(*limits)


class Weighting(nn.Module):
    """Losses by name -> their weighted sum. Its state is buffers and parameters, so that checkpoints hold it.

    window, decay, temperature   of "dynamic": iterations between updates, of the averages, and T
    rate, asymmetry              of "gradnorm": step of the weights, and how much slow learners gain
    """

    def __init__(
        self, names: Sequence[str], kind: str = "dynamic", window: int = 100, decay: float = 0.98,
        temperature: float = 2.0, rate: float = 0.025, asymmetry: float = 1.5,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise UsageError(f"There is no weighting {kind!r}; choose one of {', '.join(KINDS)}.")
        self.names, self.kind = tuple(names), kind
        self.window, self.decay, self.temperature = window, decay, temperature
        self.rate, self.asymmetry = rate, asymmetry
        count = len(self.names)
        self.register_buffer("weights", torch.ones(count))
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("before", torch.zeros(count))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        if kind == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Mapping[str, Tensor], shared: nn.Parameter | None = None) -> Tensor:
        """The sum to descend. `shared`: the last weights that all losses have in common, for "gradnorm"."""
        values = torch.stack([losses[name] for name in self.names])
        if self.kind == "uncertainty":
            self.weights.copy_((-self.log_variance).exp().detach())
            return ((-self.log_variance).exp() * values + self.log_variance).sum()
        total = (self.weights.clone() * values).sum()
        if self.kind == "dynamic":
            self._follow(values.detach())
        if self.kind == "gradnorm":
            self._balance(values, shared)
        return total

    @property
    def factors(self) -> dict[str, Tensor]:
        """The weights in use, by name."""
        return {f"weight_{name}": weight for name, weight in zip(self.names, self.weights, strict=True)}

    @torch.no_grad()
    def _follow(self, values: Tensor) -> None:
        fresh = 1 - 2 / (self.window + 1)  # forgets what came before the window
        decay = min(self.decay, fresh, float(self.seen) / (1 + float(self.seen)))  # a plain mean at first
        self.mean.lerp_(values, 1 - decay)
        self.seen += 1
        if int(self.seen) % self.window == 0:
            if int(self.seen) > self.window:
                ratios = self.mean / self.before.clamp_min(1e-12)
                self.weights.copy_(dynamic_weights(ratios, self.temperature, (0.5, 1.5)))
            self.before.copy_(self.mean)

    def _balance(self, values: Tensor, shared: nn.Parameter) -> None:
        """One step on Σ |w_j n_j - target_j|: n_j the gradient norm of loss j; its slope in w_j is n_j times a sign."""
        slopes = [torch.autograd.grad(v, shared, retain_graph=True, allow_unused=True)[0] for v in values]
        norms = torch.stack([values.new_zeros(()) if slope is None else slope.norm() for slope in slopes])
        with torch.no_grad():
            if not self.seen:
                self.before.copy_(values)
            self.seen += 1
            pace = values / self.before.clamp_min(1e-12)
            pace = (pace / pace.mean()) ** self.asymmetry
            weighted = self.weights * norms
            step = (norms / norms.mean().clamp_min(1e-12)) * (weighted - weighted.mean() * pace).sign()
            weights = (self.weights - self.rate * step).clamp_min(1e-3)
            self.weights.copy_(len(values) * weights / weights.sum())
