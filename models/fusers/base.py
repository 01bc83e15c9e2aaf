"""The contract of all fusers: a registered infrared and visible pair becomes one picture.

    out = fuser.fuse(infrared, visible, aux)         # tensors
    pictures = fuser.pictures(infrared, visible)     # uint8 arrays, as files hold them

A fuser is a module; its weights and its constructor's arguments lie in one folder, and `load_fuser` opens any of them.
SegMiF also has `segment` and `features`.

Legend: B batch, H W height and width, any size; tensors are float in 0..1, pictures uint8 [H,W] or [H,W,3].
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import FUSERS, find
from models.errors import UsageError
from models.fusers.colour import recolour
from models.fusers.precision import autocast

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class FusionOut(NamedTuple):
    """luminance [B,1,H,W] and image [B,3,H,W] in 0..1; extras: what else a fuser has to show, by name."""

    luminance: Tensor
    image: Tensor
    extras: dict[str, Tensor]


class Fuser(nn.Module, ABC):
    """What every fuser shares: checks, files, and pictures in and out.

    A subclass has `name`, keeps its constructor's arguments in `config` (plain JSON values) and writes `_fuse`.

    trainer         "module:attribute" of what trains it, or None for those that need no weights: a class of
                    (settings, fuser) with `iterate(pairs, step)`, `parts(name)` and the trained `fuser`
    needs_labels    its training also takes class masks, and its constructor the number of classes
    deterministic   the same pair, seed and weights give the same picture
    stride          sides are padded to multiples of it inside; the output always has the input's size
    """

    name: ClassVar[str]
    trainer: ClassVar[str | None] = None
    needs_labels: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True
    stride: int = 1

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def fuse(self, infrared: Tensor, visible: Tensor, aux: Mapping[str, Any] | None = None) -> FusionOut:
        """infrared [B,1,H,W] and visible [B,3,H,W], float in 0..1, of any one size -> FusionOut of that size.

        aux may hold, for the fusers that use them: "mask_infrared" and "mask_visible" [B,1,H,W] in 0..1, "saliency"
        [B,1,H,W] in 0..1, "seeds" (one integer per image), "steps" (of diffusion). Raises UsageError for shapes that do
        not fit.
        """
        check_pair(infrared, visible)
        with autocast(infrared.device):
            luminance, extras = self._fuse(infrared, visible, dict(aux or {}))
        luminance = luminance.float().clamp(0, 1)
        image = extras.pop("image", None)
        return FusionOut(luminance, recolour(luminance, visible.float()) if image is None else image, extras)

    @abstractmethod
    def _fuse(self, infrared: Tensor, visible: Tensor, aux: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The fused luminance [B,1,H,W], and extras; an extra "image" replaces the recoloured luminance."""

    @torch.inference_mode()
    def pictures(
        self,
        infrared: Sequence[np.ndarray],
        visible: Sequence[np.ndarray],
        aux: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[np.ndarray]:
        """uint8 [H,W] and [H,W,3] each -> fused uint8 [H,W,3] each, rounded once and not stretched.

        One pair at a time, so that a picture depends on its own pair, masks (uint8 [H,W]) and seed alone. Raises
        UsageError when the two of a pair differ in size.
        """
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        extra = aux or [{}] * len(infrared)
        drawn = []
        for grey, colour, more in zip(infrared, visible, extra, strict=True):
            tensors = {k: to_unit(v)[None].to(device) if isinstance(v, np.ndarray) else v for k, v in more.items()}
            pair = (to_unit(picture)[None].to(device) for picture in (grey, colour))
            drawn.append(to_picture(self.fuse(*pair, tensors).image[0]))
        return drawn

    def save(self, folder: Path) -> None:
        """Writes config.json and, where there are weights, model.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        facts = {"fuser": self.name, "settings": self.config}
        (Path(folder) / CONFIG).write_text(json.dumps(facts, indent=1))
        state = {name: x.contiguous().cpu() for name, x in self.state_dict().items()}
        if state:
            save_file(state, Path(folder) / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Fuser:
        """The fuser that `save` wrote, in eval mode, on the GPU where there is one."""
        fuser = cls(**json.loads((Path(folder) / CONFIG).read_text())["settings"])
        if fuser.state_dict():
            fuser.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return fuser.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_fuser(source: str | Path) -> Fuser:
    """The fuser of a folder that `save` wrote, or a control by its name.

    Raises UsageError for a name that has to be fitted first, or that does not exist.
    """
    folder = Path(source)
    if (folder / CONFIG).is_file():
        return find(FUSERS, json.loads((folder / CONFIG).read_text())["fuser"]).load(folder)
    if folder.is_dir():
        raise UsageError(f"{folder} holds no fuser; give a folder with {CONFIG}, or one of {', '.join(FUSERS)}.")
    kind = find(FUSERS, str(source))
    if kind.trainer:
        raise UsageError(f"{source} has to be fitted first; give the folder of a fitted one in place of its name.")
    return kind().eval()


def check_pair(infrared: Tensor, visible: Tensor) -> None:
    """Raises UsageError unless the shapes are [B,1,H,W] and [B,3,H,W]."""
    given = f"infrared {list(infrared.shape)} and visible {list(visible.shape)}"
    if infrared.dim() != 4 or visible.dim() != 4 or infrared.shape[1] != 1 or visible.shape[1] != 3:
        raise UsageError(f"A fuser takes [B,1,H,W] and [B,3,H,W]; got {given}.")
    if infrared.shape[::2] != visible.shape[::2] or infrared.shape[3] != visible.shape[3]:
        raise UsageError(f"The two pictures of a pair have one size; got {given}.")


def to_unit(picture: np.ndarray) -> Tensor:
    """uint8 [H,W] or [H,W,3] -> float [c,H,W] in 0..1."""
    array = picture[..., None] if picture.ndim == 2 else picture
    return torch.tensor(array).permute(2, 0, 1).float() / 255


def to_picture(image: Tensor) -> np.ndarray:
    """float [c,H,W] in 0..1 -> uint8 [H,W] or [H,W,3]: cut, rounded once, not stretched."""
    array = (image.float() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return array[..., 0] if array.shape[2] == 1 else array
