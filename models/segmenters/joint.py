"""Joint training of the generalised segmenter (Syn4Seg spec §4.1, step 4): losses, steps, and who is in a batch.

Base pictures, synthetic ones and supports share a batch:  L = CE_base + α CE_synthetic + CE_support + γ KD, with KD the
divergence from the frozen base model on base pictures, the novel classes' share counted as background (as DIaM does,
arXiv 2303.16005).

Base pictures hide novel objects as background. What the model sees as novel is given back to it (`relabel_background`);
what it does not see yet is pushed away all the same, unless background may mean anything novel, too, in a share of the
loss: the unbiased cross-entropy of MiB (arXiv 2002.00718), with novel classes where MiB has old ones.

Legend: B pictures, K_b base and K_n novel classes, C = 1 + K_b + K_n, H x W label pixels, h x w cells.
Class indices are places in the head (`models.segmenters.generalised`): 0 background, then base, then novel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.backbone import Features
from models.episode import draw
from models.errors import UsageError
from models.losses import IGNORE, cross_entropy
from models.segmenters.generalised import Generalised

ROLES = ("base", "synthetic", "support")


@dataclass(frozen=True)
class JointSettings:
    """mix: base, synthetic and support pictures of a batch. alpha: α; it rises from alpha_start over the first
    warm_up share of the steps. distil: γ. tau: share from which background of a base picture is taken for the novel
    class that the model sees there. hidden: share of CE_base that lets background be anything novel, 0 (as in Syn4Seg)
    to 1. rate, power: SGD with polynomial decay."""

    mix: tuple[int, int, int] = (8, 6, 2)
    alpha: float = 1.0
    alpha_start: float = 0.5
    warm_up: float = 0.1
    distil: float = 1.0
    tau: float = 0.9
    hidden: float = 0.0
    rate: float = 1e-3
    momentum: float = 0.9
    decay: float = 1e-4
    power: float = 0.9
    steps: int = 20_000

    def __post_init__(self) -> None:
        if not 0 <= self.hidden <= 1:
            raise UsageError(f"train.joint.hidden is a share of 0 to 1, not {self.hidden}; choose one.")

    def alpha_at(self, step: int) -> float:
        risen = min(step / max(self.warm_up * self.steps, 1), 1.0)
        return self.alpha_start + (self.alpha - self.alpha_start) * risen

    def rate_at(self, step: int) -> float:
        return self.rate * (1 - step / self.steps) ** self.power


@dataclass(frozen=True)
class JointBatch:
    """features of B pictures; label long [B, H, W] of class indices (255 ignored); role long [B], a place in ROLES."""

    features: Features
    label: Tensor
    role: Tensor

    def of(self, role: str) -> Tensor:
        return self.role == ROLES.index(role)


def fold_novel(logits: Tensor, base_count: int) -> Tensor:
    """Log shares [B, 1 + K_b, ...] over background and base classes; what novel classes take counts as background."""
    log_shares = logits.float().log_softmax(1)
    background = torch.cat([log_shares[:, :1], log_shares[:, 1 + base_count :]], 1).logsumexp(1, keepdim=True)
    return torch.cat([background, log_shares[:, 1 : 1 + base_count]], 1)


def distillation(folded: Tensor, teacher: Tensor) -> Tensor:
    """Mean over pixels of KL(teacher || student) between background and base classes; 0 of an empty batch.

    folded [B, 1 + K_b, h, w] of the student (`fold_novel`); teacher: logits [B, C, h, w], of which the novel classes
    are left out.
    """
    if not len(folded):
        return folded.sum()
    known = teacher[:, : folded.shape[1]].float().log_softmax(1)
    return (known.exp() * (known - folded)).sum(1).mean()


@torch.no_grad()
def relabel_background(label: Tensor, logits: Tensor, base_count: int, tau: float) -> Tensor:
    """Base labels hide novel objects as background. Background that the model sees as a novel class becomes that class
    from share τ on, and 255 below it: never background against the model's own opinion."""
    share, best = logits.softmax(1).max(1)
    seen = (label == 0) & (best > base_count)
    return torch.where(seen, torch.where(share >= tau, best, IGNORE), label)


def joint_losses(
    model: Generalised, teacher: Generalised, batch: JointBatch, settings: JointSettings, step: int,
) -> dict[str, Tensor]:
    """"base", "synthetic", "support", "distil", and their weighted sum "loss": scalars with gradient."""
    logits = model(batch.features, tuple(batch.label.shape[-2:]))
    base, count = batch.of("base"), len(model.space.base)
    label = batch.label.clone()
    label[base] = relabel_background(label[base], logits[base].detach(), count, settings.tau)
    losses = {role: cross_entropy(logits[batch.of(role)], label[batch.of(role)]) for role in ROLES}
    folded = fold_novel(logits[base], count)
    if settings.hidden:  # log shares are logits of themselves
        losses["base"] = losses["base"].lerp(cross_entropy(folded, batch.label[base]), settings.hidden)
    with torch.no_grad():
        shown = Features(*(level[base] for level in batch.features))
        taught = teacher(shown, tuple(batch.label.shape[-2:])) if base.any() else logits[base]
    losses["distil"] = distillation(folded, taught)
    weights = {"base": 1.0, "synthetic": settings.alpha_at(step), "support": 1.0, "distil": settings.distil}
    return losses | {"loss": sum(weights[name] * losses[name] for name in weights)}


# ---- the loop's parts


def optimiser_of(model: Generalised, settings: JointSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), settings.rate, settings.momentum, weight_decay=settings.decay)


def joint_step(
    model: Generalised, teacher: Generalised, optimiser: torch.optim.Optimizer, batch: JointBatch,
    settings: JointSettings, step: int,
) -> dict[str, Tensor]:
    """One step of joint training; statistics of batch normalisation stay as the base training left them.

    Returns the losses, detached. The caller checks that they are finite.
    """
    train_frozen(model)
    for group in optimiser.param_groups:
        group["lr"] = settings.rate_at(step)
    losses = joint_losses(model, teacher, batch, settings, step)
    optimiser.zero_grad(set_to_none=True)
    losses["loss"].backward()
    optimiser.step()
    return {name: value.detach() for name, value in losses.items()}


def base_step(model: Generalised, optimiser: torch.optim.Optimizer, features: Features, label: Tensor) -> Tensor:
    """One step of base training on labels [B, H, W] of class indices without novel ones; returns the loss, detached."""
    logits = model.train()(features, tuple(label.shape[-2:]))[:, : 1 + len(model.space.base)]
    loss = cross_entropy(logits, label)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.detach()


def train_frozen(model: nn.Module) -> None:
    """Training mode, but batch normalisation keeps its statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def joint_keys(
    base: Sequence[str], synthetic: Mapping[int, Sequence[str]], supports: Mapping[int, Sequence[str]],
    mix: Sequence[int], seed: int, step: int,
) -> list[tuple[str, str, int]]:
    """(role, id, novel class or 0) of the pictures of one batch, a pure function of (seed, step); novel classes take
    turns. synthetic, supports: novel class -> ids. Kinds without any picture are left out.
    """
    keys = [("base", id, 0) for id in _some(base, mix[0], seed, step, "base")]
    for role, pool, count in (("synthetic", synthetic, mix[1]), ("support", supports, mix[2])):
        classes = sorted(k for k, ids in pool.items() if ids)
        turns = [classes[(step * count + place) % len(classes)] for place in range(count)] if classes else []
        keys += [(role, _some(pool[k], 1, seed, step, role, place)[0], k) for place, k in enumerate(turns)]
    return keys


def _some(ids: Sequence[str], count: int, *key: object) -> list[str]:
    """`count` of the ids; without replacement as long as there are enough."""
    if len(ids) >= count:
        return draw(ids, count, *key)
    return [draw(ids, 1, *key, n)[0] for n in range(count if ids else 0)]
