"""Frozen image encoders: one forward gives three levels of features.

Legend: B images, H x W pixels (both 8n or both 8n + 1), h x w = ⌈H/8⌉ x ⌈W/8⌉ cells, c channels.

Which encoders there are, and how strides beyond 8 become dilation, stands in `models/encoders.py`. Without dilation the
levels keep their own strides (8, 16, 32), which is less work, and `similarity.to_grid` joins them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from models.encoders import EncoderSettings, Parts, build_parts, fold_norms
from models.errors import UsageError
from models.geometry import is_valid

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Wants(NamedTuple):
    """What a learner reads beside the three levels. blocks: the maps of single blocks; masked: the high level of a
    support whose mid level was masked before it (BAM's prior)."""

    blocks: bool = False
    masked: bool = False


LEVELS = Wants()


class Features(tuple):
    """The levels (low, mid, high), each [B, c, h', w']: one grid of stride 8, or strides 8, 16, 32.

    A fourth entry, where the encoder was asked for it: `blocks` [B, h·w, Σ c] on the grid of the low level, of each
    block's cells a unit vector; out of a bank a list of B maps, too large to be copied side by side. A fifth, of
    supports alone: `masked` [B, c, h', w'].
    """

    def __new__(cls, *levels: Tensor) -> Features:
        return super().__new__(cls, levels)

    def __getnewargs__(self) -> tuple[Tensor, ...]:
        return tuple(self)

    def part(self, start: int, stop: int | None) -> Features:
        """Those of pictures start to stop."""
        return Features(*(level[start:stop] for level in self))

    def shots(self, count: int) -> Features:
        """Those of B·K pictures as of B episodes with K = count supports each."""
        return Features(*(_grouped(level, count) for level in self))

    low = property(itemgetter(0))
    mid = property(itemgetter(1))
    high = property(itemgetter(2))
    blocks = property(itemgetter(3))
    masked = property(itemgetter(4))


def _grouped(level: Tensor | list[Tensor], count: int) -> Tensor | list[list[Tensor]]:
    if isinstance(level, Tensor):
        return level.unflatten(0, (-1, count))
    return [level[start : start + count] for start in range(0, len(level), count)]


class Encoder(nn.Module):
    """Frozen stages behind one normalisation; always in eval mode, never with gradient.

    channels: widths of (low, mid, high). blocks: widths of the block maps that `wants` asks for, else ().
    Raises UsageError when this encoder cannot give what is wanted.
    """

    def __init__(self, parts: Parts, mean, deviation, precision: str = "auto", wants: Wants = LEVELS) -> None:
        super().__init__()
        if (wants.blocks and not parts.taps) or (wants.masked and parts.last is None):
            raise UsageError("This encoder has no block maps; choose a ResNet, vgg16_bn or mobilenet_v2.")
        self.stages, self.channels, self.precision, self.wants = parts.stages, parts.channels, precision, wants
        self._parts = (parts,)  # in a tuple: its modules are the stages' own
        self.blocks = tuple(width for _, width in parts.taps) if wants.blocks else ()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode: statistics of batch normalisation are frozen, too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Encode images [B, 3, H, W] in 0..1. Raises UsageError unless H and W are both 8n or both 8n + 1."""
        height, width = images.shape[-2:]
        if not is_valid(height, width):
            fit = -(-height // 8) * 8, -(-width // 8) * 8
            raise UsageError(
                f"The encoder needs sides that are multiples of 8 (or all one more), got {height}x{width}; use {fit}."
            )
        scaled = (images - self.mean) / self.deviation
        if self.wants.blocks:
            return self._deep(scaled)
        return Features(*self.stages(scaled), *([scaled.new_empty(len(images), 0, 0)] if self.wants.masked else []))

    @torch.no_grad()
    def masked(self, mid: Tensor, mask: Tensor) -> Tensor:
        """The high level of a masked mid level (BAM, PFENet): mid [B, c, h', w'], mask [B, 1, h', w'] in 0..1."""
        return self._parts[0].last(mid * mask)

    def _deep(self, scaled: Tensor) -> Features:
        parts, caught = self._parts[0], []
        if parts.before:
            hooks = [m.register_forward_pre_hook(lambda _, x: caught.append(x[0])) for m, _ in parts.taps]
        else:
            hooks = [m.register_forward_hook(lambda _, __, x: caught.append(x)) for m, _ in parts.taps]
        try:
            levels = self.stages(scaled)
        finally:
            for hook in hooks:
                hook.remove()
        grid = levels[0].shape[-2:]
        return Features(*levels, torch.cat([_unit_cells(x, grid) for x in caught], 2))


def _unit_cells(maps: Tensor, grid: torch.Size) -> Tensor:
    """[B, c, h', w'] -> unit vectors [B, h·w, c] on the grid."""
    if maps.shape[-2:] != grid:
        maps = interpolate(maps, grid, mode="bilinear", align_corners=False)
    return normalize(maps.flatten(2).transpose(1, 2).float(), dim=2).to(maps.dtype)


def build_encoder(settings: EncoderSettings, wants: Wants = LEVELS) -> Encoder:
    """The encoder that `settings` describe, frozen. Random weights come from the current torch seed.

    Raises UsageError when the name is unknown or the weights do not fit.
    """
    scale = SYMMETRIC if settings.normalise == "symmetric" else IMAGENET
    return Encoder(build_parts(settings), *scale, settings.precision, wants)


def save_encoder(folder: Path, settings: EncoderSettings) -> None:
    """Builds the encoder that `settings` describe and writes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = build_encoder(settings)
    write_encoder(folder, encoder, settings)


def write_encoder(folder: Path, encoder: Encoder, settings: EncoderSettings) -> None:
    """Writes config.json and encoder.safetensors; `load_encoder` needs nothing else."""
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in encoder.state_dict().items()}, Path(folder) / "encoder.safetensors")
    kept = asdict(replace(settings, weights="random"))
    (Path(folder) / "config.json").write_text(json.dumps(kept, indent=1))


def load_encoder(folder: Path, wants: Wants = LEVELS) -> Encoder:
    """The encoder that `save_encoder` wrote, on the CPU, its norms folded: for use, not for saving again."""
    from safetensors.torch import load_file

    stored = json.loads((Path(folder) / "config.json").read_text())
    encoder = build_encoder(EncoderSettings(**{**stored, "stages": tuple(stored["stages"])}), wants)
    encoder.load_state_dict(load_file(Path(folder) / "encoder.safetensors"))
    fold_norms(encoder)
    return encoder
