"""Settings of fusers: those of the night's fused picture, and those of the fusion studies, by size of the data.

The studies take data and compute from a recipe of `flows/recipes.py`; what they fit is here, sized for two cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from models.fusers.settings import FuserSettings, MaskSettings

MASKS = MaskSettings("levels", stability=0.5)
MOBILENET = {"encoder": "mobilenet_v2", "weights": "mobilenet_v2_imagenet_from_uint8.pth", "normalise": "symmetric"}

SEGMIF = FuserSettings(
    "segmif", {"width": 16, "growth": 8, "heads": 4, "anchor": "two_scale", "head_width": 64, **MOBILENET},
    crop=64, batch=4, iterations=600, checkpoint_every=100, objective="maximum", metric_weight=25.0,
    rate_fusion=1e-3, rate_segmentation=1e-4, segmentation_weight=0.2,
)
"""From two scales towards the sharpest gradient and all structure; told what it will be measured by."""

SGDFUSE = FuserSettings(
    "sgdfuse",
    {
        "configuration": "fast", "width": 16, "heads": 2, "blocks": (1, 1), "anchor": "two_scale", "base": 16,
        "mults": (1, 2, 4), "res_blocks": 1, "dropout": 0.0,
    },
    crop=64, batch=4, iterations=1000, checkpoint_every=100, first_share=0.6, rate=1e-3, rate_last=1e-5, average=0.99,
    metric_weight=25.0, intensity_weight=0.5, masks=MASKS,
)
"""Two by two pixels folded, four steps; Stage I told likewise. Masks are from grey levels, which need no weights: what
they point at weighs 0.5, not the released 1.5."""

JOINT = replace(
    SEGMIF, crop=128, iterations=800, metric_weight=0.0, segmentation_weight=1.0, rate_segmentation=1e-3,
    head_factor=3.0, class_balance=0.25,
)
"""SegMiF for its labels: larger crops, and fusion that serves segmentation. Rate and balance were chosen by infrared
alone on a sixth of the train frames."""

TINY_SEGMIF = replace(
    SEGMIF,
    network={
        "width": 8, "growth": 4, "heads": 2, "anchor": "two_scale", "widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1),
        "head_width": 8,
    },
    crop=48, batch=2, iterations=2, checkpoint_every=2,
)  # fmt: skip
TINY_SGDFUSE = replace(
    SGDFUSE, network={**SGDFUSE.network, "width": 8, "base": 8, "mults": (1, 2)}, crop=48, batch=2, iterations=4,
    checkpoint_every=2,
)


@dataclass(frozen=True)
class FusionSizes:
    """What the fusion studies fit.

    segmif, sgdfuse: the fusers. joint: SegMiF whose segmentation all sensors are compared by. radii: pixels by which
    masks are shrunk (negative) and grown. steps: of diffusion, few and many. scenes: of the contact sheet.
    """

    segmif: FuserSettings = SEGMIF
    sgdfuse: FuserSettings = SGDFUSE
    joint: FuserSettings = JOINT
    radii: tuple[int, ...] = (-8, -4, -2, 2, 4, 8)
    steps: tuple[int, ...] = (1, 4)
    scenes: int = 4


TOY = FusionSizes(TINY_SEGMIF, TINY_SGDFUSE, TINY_SEGMIF, radii=(-2, 2), steps=(1, 2), scenes=2)


def sized(recipe: Any) -> FusionSizes:
    """What is fitted on the recipe's data."""
    return TOY if recipe.data.dataset == "toy" else FusionSizes()
