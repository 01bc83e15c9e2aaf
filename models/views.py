"""Pictures, labels and features of prepared frames, in every modality that exists of them.

A layer is one picture of a frame: `infrared` and `visible` are real, `lightness`, `rgb` and `rgb_lightness` are
translations, `fused` is infrared and a visible picture in one. A stream is what one meta learner sees: in testing one
layer, in training also its stand-in.

Legend: B items, H x W canvas, c channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.backbone import Encoder, Features
from models.episode import IGNORE, train_label
from models.frames import Frames, layer_name, read_png
from models.geometry import Canvas, as_image, cells
from models.pseudoclasses import PseudoSettings, Regions, find_regions, move_label, plan
from models.pseudoclasses import episode as pseudo_episode
from models.pseudolabels import carry_freed

REAL = ("infrared", "visible", "label")
FUSED = "fused"
PSEUDO_MARK = "~"
PSEUDO = 254
"""The label of the region that a pseudo-episode asks for."""


@dataclass(frozen=True)
class Stream:
    """One modality: its name in the scores, the layer it reads, and the layer that stands in for it in training."""

    name: str
    layer: str
    stand_in: str | None = None


STREAMS = (Stream("infrared", "infrared", "lightness"), Stream("rgb", "rgb", "rgb_lightness"))


class Views:
    """All layers of one prepared dataset. synthetic, refined, fused: folders of those stages, where they exist."""

    def __init__(
        self, frames: Frames, synthetic: Path | None = None, refined: Path | None = None, fused: Path | None = None
    ) -> None:
        self.frames, self.synthetic, self.refined, self.fused = frames, synthetic, refined, fused

    def picture(self, id: str, layer: str) -> np.ndarray:
        """uint8 [H,W] or [H,W,3] at the frame's own size."""
        if layer in REAL:
            return read_png(self.frames.path(id, layer))
        return read_png(self._folder(layer) / layer_name(id, layer))

    def has(self, id: str, layer: str) -> bool:
        if layer in REAL:
            return self.frames.has(id, layer)
        folder = self._folder(layer)
        return folder is not None and (folder / layer_name(id, layer)).is_file()

    def _folder(self, layer: str) -> Path | None:
        return self.fused if layer == FUSED else self.synthetic

    def label(self, id: str, layer: str = "infrared", novel: Sequence[int] = (), policy: str = "ignore") -> np.ndarray:
        """uint8 [H,W] as training may see it on this layer: novel ids hidden by `policy`, freed base regions 255."""
        label = self.frames.label(id)
        seen = train_label(label, novel, policy)
        if layer in REAL or self.refined is None:
            return seen
        path = self.refined / layer_name(id, f"{layer}.label")
        return carry_freed(seen, label, read_png(path), novel) if path.is_file() else seen


class PseudoViews(Views):
    """Views that also show pseudo-episodes: `show(id, number)` names their support and query, which are pictures like
    any other; on them the asked region is PSEUDO, and what training must not see of the frame is hidden as ever.
    """

    def __init__(
        self, frames: Frames, synthetic: Path | None = None, refined: Path | None = None,
        settings: PseudoSettings | None = None, seed: int = 0, fused: Path | None = None,
    ) -> None:
        super().__init__(frames, synthetic, refined, fused)
        self.settings, self.seed = settings or PseudoSettings(), seed
        self.regions: dict[str, Regions] = {}

    def of_seed(self, seed: int) -> PseudoViews:
        """The same frames and regions, other pseudo-episodes."""
        other = copy(self)
        other.seed = seed
        return other

    def show(self, id: str, number: int) -> tuple[str, str]:
        """The names of support and query of pseudo-episode `number` of frame `id`."""
        return tuple(PSEUDO_MARK.join([id, str(number), side]) for side in ("support", "query"))

    def asks(self, id: str) -> bool:
        """Whether the frame has a region to ask for."""
        return len(self._regions(id)) > 0

    def picture(self, id: str, layer: str) -> np.ndarray:
        frame, *episode = id.split(PSEUDO_MARK)
        shown = super().picture(frame, layer)
        if not episode or episode[1] == "support":
            return shown
        key = (self._regions(frame), self.seed, frame, int(episode[0]), self.settings)
        return pseudo_episode(shown, *key).query

    def label(self, id: str, layer: str = "infrared", novel: Sequence[int] = (), policy: str = "ignore") -> np.ndarray:
        frame, *episode = id.split(PSEUDO_MARK)
        if not episode:
            return super().label(id, layer, novel, policy)
        regions = self._regions(frame)
        region, *movement = plan(regions, self.seed, frame, int(episode[0]), self.settings)
        marked = regions.mask(region) * np.uint8(PSEUDO)
        if self.frames.has(frame, "label") and policy != "background":
            marked[np.isin(self.frames.label(frame), [*novel, IGNORE])] = IGNORE
        return marked if episode[1] == "support" else move_label(marked, *movement)

    def _regions(self, id: str) -> Regions:
        if id not in self.regions:
            self.regions[id] = find_regions(self.frames.infrared(id), self.settings)
        return self.regions[id]


class FeatureBank:
    """Frozen features of (frame, layer), each encoded once and kept while `budget` bytes last.

    Levels leave as float32 batches; they rest as `rest` at the strides that the encoder gave. Block maps, which are
    many, leave as they rest, in a list.
    """

    def __init__(
        self, encoder: Encoder, views: Views, canvas: Canvas, budget: int = 4 << 30, batch: int = 8,
        rest: torch.dtype = torch.float16,
    ) -> None:
        self.encoder, self.views, self.canvas, self.budget, self.batch = encoder, views, canvas, budget, batch
        self.rest = rest
        self.device = encoder.mean.device
        self.held: OrderedDict[tuple[str, str], Features] = OrderedDict()
        self.bytes = 0

    def showing(self, views: Views) -> FeatureBank:
        """A bank of other views of the same pictures, which knows already what this one knows of real frames."""
        other = FeatureBank(self.encoder, views, self.canvas, self.budget, self.batch, self.rest)
        for key, features in self.held.items():
            if PSEUDO_MARK not in key[0]:
                other._hold(key, features)
        return other

    @property
    def grid(self) -> tuple[int, int]:
        return cells(*self.canvas.size)

    def get(self, keys: Sequence[tuple[str, str]]) -> Features:
        """Levels [B, c, h', w'] of (id, layer) keys, B block maps; what is missing is encoded in one go."""
        missing = list(dict.fromkeys(key for key in keys if key not in self.held))
        fresh: dict[tuple[str, str], Features] = {}
        for start in range(0, len(missing), self.batch):
            fresh |= self._encode(missing[start : start + self.batch])
        for key in keys:
            if key in self.held:
                self.held.move_to_end(key)
        rows = [fresh.get(key) or self.held[key] for key in keys]
        for key, features in fresh.items():
            self._hold(key, features)
        low, mid, high, *blocks = zip(*rows, strict=True)
        levels = (torch.stack(level).to(self.device, torch.float32) for level in (low, mid, high))
        return Features(*levels, *([cells.to(self.device) for cells in maps] for maps in blocks))

    def _encode(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Features]:
        images = torch.stack([self.canvas.image(as_image(self.views.picture(*key))) for key in keys])
        maps = encode(self.encoder, images.to(self.device))
        return {key: Features(*(level[i].to(self.rest, copy=True) for level in maps)) for i, key in enumerate(keys)}

    def _hold(self, key: tuple[str, str], features: Features) -> None:
        size = sum(level.nbytes for level in features)
        if size > self.budget:
            return
        self.held[key] = features
        self.bytes += size
        while self.bytes > self.budget:
            _, old = self.held.popitem(last=False)
            self.bytes -= sum(level.nbytes for level in old)


def encode(encoder: Encoder, images: Tensor) -> Features:
    """One frozen forward of [B, 3, H, W]: channels last, in the encoder's precision; levels leave as float32."""
    images = images.contiguous(memory_format=torch.channels_last)
    able = images.device.type == "cuda" and torch.cuda.is_bf16_supported()
    small = able if encoder.precision == "auto" else encoder.precision == "bfloat16"
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=small):
        maps = encoder(images)
    return Features(*(level.float() for level in maps[:3]), *maps[3:])


def episode_mask(label: np.ndarray, wanted: int) -> Tensor:
    """uint8 [H,W] of {0, 1, 255} for one class out of a label map."""
    mask = (label == wanted).astype(np.uint8)
    mask[label == IGNORE] = IGNORE
    return torch.from_numpy(mask)
