"""One segmenter for base and novel classes together (generalised few-shot segmentation; Syn4Seg spec §4.1).

A PSPNet trunk over frozen features, with a cosine head: one row a class, so that a novel class can be registered by its
prototype before anything is trained on it (`models.segmenters.joint`).

Legend: B pictures, K_b base and K_n novel classes, C = 1 + K_b + K_n, H x W label pixels, h x w cells.
Class ids are the dataset's; class indices are places in the head: 0 background, then base, then novel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from models.backbone import Features
from models.errors import UsageError
from models.losses import IGNORE
from models.segmenters.pspnet import PSPNet


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
