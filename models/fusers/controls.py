"""Fusers that learn nothing: what every learnt one has to beat.

Legend: B batch, H W height and width; luminances are float in 0..1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.fusers.anchors import two_scale
from models.fusers.base import Fuser
from models.fusers.colour import luminance
from models.fusers.saliency import saliency_blend


class Average(Fuser):
    """The mean of both."""

    name = "average"

    def _fuse(self, infrared: Tensor, visible: Tensor, aux: dict[str, Any]) -> tuple[Tensor, dict]:
        return (infrared + luminance(visible)) / 2, {}


class Maximum(Fuser):
    """The brighter of both, pixel by pixel."""

    name = "maximum"

    def _fuse(self, infrared: Tensor, visible: Tensor, aux: dict[str, Any]) -> tuple[Tensor, dict]:
        return torch.maximum(infrared, luminance(visible)), {}


class Saliency(Fuser):
    """Both, weighed by how rare their grey levels are (`models.fusers.saliency`)."""

    name = "saliency"

    def _fuse(self, infrared: Tensor, visible: Tensor, aux: dict[str, Any]) -> tuple[Tensor, dict]:
        return saliency_blend(infrared, luminance(visible)), {}


class TwoScale(Fuser):
    """The glow of the brighter, the detail of the livelier (`models.fusers.anchors`)."""

    name = "two_scale"

    def _fuse(self, infrared: Tensor, visible: Tensor, aux: dict[str, Any]) -> tuple[Tensor, dict]:
        return two_scale(infrared, luminance(visible)), {}
