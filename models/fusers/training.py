"""What the training of both fusers shares: batches of pairs, rates, one step of an optimiser.

Legend: B batch, H W height and width of a crop; pictures are float in 0..1, labels class ids with 255 unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from models.fusers.base import to_unit
from models.losses import IGNORE


class Pairs(NamedTuple):
    """infrared [B,1,H,W], visible [B,3,H,W]; label [B,H,W] and masks [B,1,H,W] where they are used."""

    infrared: Tensor
    visible: Tensor
    label: Tensor | None = None
    mask_infrared: Tensor | None = None
    mask_visible: Tensor | None = None

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(*(None if x is None else x.to(device) for x in self))


def crop_pair(
    layers: Mapping[str, np.ndarray], crop: int, scale: tuple[float, float], rng: np.random.Generator
) -> Pairs:
    """A square of one frame, without the batch dimension. layers: by the names of Pairs, uint8 [H,W] or [H,W,3].

    All layers take the same scale, corner and flip. Where the frame is smaller than the crop its edge is repeated, and
    labels are unknown.
    """
    factor = math.exp(rng.uniform(*np.log(scale)))
    height, width = (max(1, round(side * factor)) for side in layers["infrared"].shape[:2])
    top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in (height, width))
    flipped = rng.random() < 0.5
    cut = {}
    for name, layer in layers.items():
        known = name != "label"
        image = to_unit(layer)[None] if known else torch.from_numpy(np.array(layer))[None, None].float()
        if factor != 1:
            image = F.interpolate(image, (height, width), mode="bilinear" if known else "nearest-exact")
        image = image[..., top : top + crop, left : left + crop]
        missing = (0, crop - image.shape[3], 0, crop - image.shape[2])
        image = F.pad(image, missing, mode="replicate") if known else F.pad(image, missing, value=IGNORE)
        image = image.flip(3) if flipped else image
        cut[name] = image[0] if known else image[0, 0].long()
    return Pairs(**cut)


def stack_pairs(items: Sequence[Pairs]) -> Pairs:
    """A batch of what `crop_pair` cut."""
    return Pairs(*(None if layer[0] is None else torch.stack(layer) for layer in zip(*items, strict=True)))


def linear_rate(step: int, total: int, warm_up: float = 0.05) -> float:
    """A factor that climbs over the first share of the steps and falls to 0 in a line."""
    share = (step + 1) / max(1, total)
    return min(share / warm_up, 1.0) * max(0.0, 1 - step / max(1, total))


def cosine_rate(step: int, total: int, last: float) -> float:
    """A factor from 1 to `last`."""
    return last + (1 - last) * (1 + math.cos(math.pi * min(1.0, step / max(1, total)))) / 2


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor


def with_initial_rates(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Remembers each group's rate, for `set_rate`."""
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser


def descend(loss: Tensor, *optimisers: torch.optim.Optimizer, clip: float = 1.0) -> None:
    """One step of each, with gradients averaged over processes and cut to norm `clip` per optimiser."""
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for optimiser in optimisers:
        parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        if dist.is_initialized() and dist.get_world_size() > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode and without gradients of its own; what flows through it still has some."""
    training, wanted = module.training, [p.requires_grad for p in module.parameters()]
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter, want in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)


@torch.no_grad()
def average_into(averaged: nn.Module, trained: nn.Module, decay: float) -> None:
    """averaged <- decay averaged + (1 - decay) trained, parameters; buffers are copied."""
    torch._foreach_lerp_(list(averaged.parameters()), list(trained.parameters()), 1 - decay)
    for old, new in zip(averaged.buffers(), trained.buffers(), strict=True):
        old.copy_(new)
