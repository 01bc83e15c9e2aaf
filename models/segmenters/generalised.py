"""One segmenter for base and novel classes together (generalised few-shot segmentation; Syn4Seg spec §4.1).

A PSPNet trunk over frozen features, with a cosine head: one row a class, so that a novel class can be registered by its
prototype before anything is trained on it. Joint training mixes base pictures, synthetic ones and supports in one
batch:  L = CE_base + α CE_synthetic + CE_support + γ KD, with KD the divergence from the frozen base model on base
pictures, the novel classes' share counted as background (as DIaM does, arXiv 2303.16005).

Legend: B pictures, K_b base and K_n novel classes, C = 1 + K_b + K_n, H x W label pixels, h x w cells.
Class ids are the dataset's; class indices are places in the head: 0 background, then base, then novel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from models.backbone import Features
from models.episode import draw
from models.errors import UsageError
from models.losses import IGNORE, cross_entropy
from models.segmenters.pspnet import PSPNet

ROLES = ("base", "synthetic", "support")


@dataclass(frozen=True)
class ClassSpace:
    """Which class ids are base and which are novel, each in ascending order, and their indices in the head."""

    base: tuple[int, ...]
    novel: tuple[int, ...]

    def __post_init__(self) -> None:
        if set(self.base) & set(self.novel) or 0 in (*self.base, *self.novel):
            raise UsageError("A class is base or novel, and 0 is neither; correct the folds.")

    @property
    def ids(self) -> tuple[int, ...]:
        return (0, *self.base, *self.novel)

    def encode(self, label: Tensor) -> Tensor:
        """Class ids -> indices, uint8 [...] to long [...]; ids of neither kind become 255."""
        table = torch.full((256,), IGNORE)
        table[list(self.ids)] = torch.arange(len(self.ids))
        return table.to(label.device)[label.long()]

    def decode(self, index: Tensor) -> Tensor:
        """Indices -> class ids, uint8; 255 stays."""
        table = torch.full((256,), IGNORE, dtype=torch.uint8)
        table[: len(self.ids)] = torch.tensor(self.ids, dtype=torch.uint8)
        return table.to(index.device)[index.long()]


class CosineHead(nn.Module):
    """logits = scale · cos(f, w_k) [B, C, h, w]; weight [C, width]."""

    def __init__(self, width: int, classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(classes, width) / width**0.5), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.einsum("bchw,kc->bkhw", normalize(x, dim=1), normalize(self.weight, dim=1))


class Generalised(nn.Module):
    """channels: widths of the encoder's (low, mid, high). width: of the trunk (512 in the field)."""

    def __init__(self, channels: Sequence[int], space: ClassSpace, width: int = 512, scale: float = 10.0) -> None:
        super().__init__()
        self.space, self.channels = space, tuple(channels)
        self.trunk = PSPNet(tuple(channels), len(space.base), width)
        self.trunk.classify = CosineHead(width, len(space.ids), scale)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Logits [B, C, *size], bilinear."""
        return self.trunk(features, size)

    def embed(self, features: Features) -> Tensor:
        """f [B, width, h, w]: what the prototypes of the labelling stage are taken of."""
        return self.trunk.embed(features)

    @torch.no_grad()
    def register_novel(self, prototypes: Tensor) -> None:
        """Make prototypes [K_n, width] the rows of the novel classes."""
        rows = self.trunk.classify.weight[1 + len(self.space.base) :]
        rows.copy_(normalize(prototypes, dim=1) * rows.norm(dim=1, keepdim=True).clamp(min=1e-3))

    @torch.no_grad()
    def rows(self) -> Tensor:
        """The head's unit rows by class id [max id + 1, width], zeros where there is none: the base prototypes."""
        table = torch.zeros(max(self.space.ids) + 1, self.trunk.width)
        table[list(self.space.ids)] = normalize(self.trunk.classify.weight.detach(), dim=1).cpu()
        return table

    def frozen(self) -> Generalised:
        """A copy that never changes: the teacher of the joint training."""
        return deepcopy(self).eval().requires_grad_(False)


def predict(logits: Tensor, space: ClassSpace, novel: Iterable[int] | None = None) -> Tensor:
    """Class ids uint8 [B, H, W]. With `novel`, the other novel classes are out of the question: the classes that a
    prompt names, for pseudo-labels, or the one class that a query asks for, in BAM's protocol."""
    if novel is not None:
        barred = [space.ids.index(k) for k in space.novel if k not in set(novel)]
        logits = logits.index_fill(1, torch.tensor(barred, dtype=torch.long, device=logits.device), -torch.inf)
    return space.decode(logits.argmax(1))


# ---- losses


@dataclass(frozen=True)
class JointSettings:
    """mix: base, synthetic and support pictures of a batch. alpha: α; it rises from alpha_start over the first
    warm_up share of the steps. distil: γ. tau: share from which background of a base picture is taken for the novel
    class that the model sees there. rate, power: SGD with polynomial decay."""

    mix: tuple[int, int, int] = (8, 6, 2)
    alpha: float = 1.0
    alpha_start: float = 0.5
    warm_up: float = 0.1
    distil: float = 1.0
    tau: float = 0.9
    rate: float = 1e-3
    momentum: float = 0.9
    decay: float = 1e-4
    power: float = 0.9
    steps: int = 20_000

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


def distillation(logits: Tensor, teacher: Tensor, base_count: int) -> Tensor:
    """Mean over pixels of KL(teacher || student) between background and base classes; 0 of an empty batch.

    logits [B, C, h, w] of the student; teacher [B, C, h, w], of which the novel classes are left out.
    """
    if not len(logits):
        return logits.sum()
    known = teacher[:, : 1 + base_count].float().log_softmax(1)
    return (known.exp() * (known - fold_novel(logits, base_count))).sum(1).mean()


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
    with torch.no_grad():
        shown = Features(*(level[base] for level in batch.features))
        taught = teacher(shown, tuple(batch.label.shape[-2:])) if base.any() else logits[base]
    losses["distil"] = distillation(logits[base], taught, count)
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


def stretched(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits at the size of a frame, bilinear."""
    return interpolate(logits, size, mode="bilinear", align_corners=False)


# ---- on disk


def save_model(folder: Path, model: Generalised, **facts: object) -> None:
    """Writes model.safetensors and config.json, with what else `load_model`'s caller wants to know."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, Path(folder) / "model.safetensors")
    config = {"base": model.space.base, "novel": model.space.novel, "channels": model.channels,
              "width": model.trunk.width, **facts}
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))


def load_model(folder: Path) -> Generalised:
    """The model that `save_model` wrote, in eval mode."""
    from safetensors.torch import load_file

    stored = json.loads((Path(folder) / "config.json").read_text())
    model = Generalised(stored["channels"], ClassSpace(tuple(stored["base"]), tuple(stored["novel"])), stored["width"])
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()
