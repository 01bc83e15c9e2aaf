"""SegMiF: fusion that sees what segmentation sees, and segmentation of what was fused.

Liu, Liu, Wu, Ma, Liu, Zhong, Luo, Fan, "Multi-interactive Feature Learning and a Full-time Multi-modality Benchmark for
Image Fusion and Segmentation", ICCV 2023, arXiv 2308.02097. The first two stages of the segmentation encoder look at a
saliency blend of the pair and steer the fusion network through its attention; the fused luminance, in the visible
colours, is what the segmentation network labels. `cascade.py` trains both.

What differs from the released code: the semantic branch stops after the stages that are used and takes the same
normalised input as segmentation; the blend is computed here, not read from files; training and testing feed the same
luminance; nothing is stretched on the way out.

Legend: B batch, K classes, H W height and width (32 or more); pictures are float in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import UsageError
from models.fusers.anchors import ANCHORS
from models.fusers.base import Fuser
from models.fusers.colour import luminance
from models.fusers.fusion_net import FusionNet
from models.fusers.saliency import saliency_blend
from models.fusers.segmentation_net import SegmentationNet
from models.generators.pictures import pad_to_stride

SMALLEST = 32  # pixels a side that the encoders need
SEMANTICS = ("saliency", "visible", "none")


class SegMiF(Fuser):
    """classes        K, background included
    semantics         what the semantic branch looks at: the saliency blend, the visible picture, or nothing
    the rest          of `FusionNet` (width, growth, heads, fold, native, anchor, norm, paths) and of
                      `SegmentationNet` (encoder, widths, depths, weights, normalise, head_width)

    The defaults are the released sizes at half resolution; fold=1, norm="sum", native=False is the released form.
    """

    name = "segmif"
    trainer = "models.fusers.cascade:Cascade"
    needs_labels = True

    def __init__(
        self,
        classes: int = 9,
        semantics: str = "saliency",
        width: int = 64,
        growth: int = 32,
        heads: int = 8,
        fold: int = 2,
        native: bool = True,
        anchor: str = "none",
        norm: str = "mean",
        paths: Sequence[str] = ("semantic", "modal"),
        **segmentation: Any,
    ) -> None:
        fusion = {"width": width, "growth": growth, "heads": heads, "fold": fold, "native": native}
        fusion |= {"anchor": anchor, "norm": norm, "paths": list(paths)}
        kept = {"classes": classes, "semantics": semantics, **fusion, **segmentation, "weights": "random"}
        super().__init__(**kept)
        if semantics not in SEMANTICS:
            raise UsageError(f"There are no semantics {semantics!r}; choose one of {', '.join(SEMANTICS)}.")
        if anchor not in ("none", *ANCHORS):
            raise UsageError(f"There is no anchor {anchor!r}; choose one of none, {', '.join(ANCHORS)}.")
        self.semantics, self.stride = semantics, fold
        self.segmentation = SegmentationNet(classes, **segmentation)
        self.fusion = FusionNet(semantic=self.segmentation.channels[:2], **fusion)

    def features(self, images: Tensor, stages: int = 4) -> list[Tensor]:
        """[B,3,H,W] in 0..1 -> maps at 1/4, 1/8, 1/16, 1/32; no more is computed than asked for."""
        return self.segmentation.features(images, stages)

    def segment(self, images: Tensor) -> Tensor:
        """Fused (or other) pictures [B,3,H,W] in 0..1 -> logits [B,K,H,W]."""
        return self.segmentation(self._padded(images))[..., : images.shape[2], : images.shape[3]]

    @torch.no_grad()
    def semantic_features(self, infrared: Tensor, visible: Tensor, blend: Tensor | None = None) -> list[Tensor] | None:
        """S_1 and S_2 of the blend [B,1,H,W] (made here when not given), or None without semantics; no gradient."""
        if self.semantics == "none":
            return None
        if self.semantics == "visible":
            return self.features(visible, 2)
        blend = saliency_blend(infrared, luminance(visible)) if blend is None else blend
        return self.features(blend.expand(-1, 3, -1, -1), 2)

    def _fuse(self, infrared: Tensor, visible: Tensor, aux: dict[str, Any]) -> tuple[Tensor, dict]:
        size = infrared.shape[2:]
        infrared, visible = self._padded(infrared), self._padded(visible)
        blend = self._padded(aux["saliency"]) if "saliency" in aux else None
        semantics = self.semantic_features(infrared, visible, blend)
        return self.fusion(infrared, luminance(visible), semantics)[..., : size[0], : size[1]], {}

    def _padded(self, images: Tensor) -> Tensor:
        """Bottom and right, to the stride and to what the encoder needs."""
        short = [max(0, SMALLEST - side) for side in images.shape[2:]]
        images = F.pad(images, (0, short[1], 0, short[0]), mode="replicate") if any(short) else images
        return pad_to_stride(images, self.stride)
