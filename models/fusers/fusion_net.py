"""The fusion network of SegMiF (arXiv 2308.02097): dense blocks per modality, semantics let in twice.

Released: everything at full resolution, width 64, growth 32. With fold 2 the same network works on blocks of 2 x 2
pixels, which costs a quarter; it is another model with other weights.

Legend: B batch, C width, H W height and width (multiples of fold), r fold; S_1 S_2 the semantic encoder's first two
stages at 1/4 and 1/8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fusers.anchors import ANCHORS
from models.fusers.attention import HierarchicalAttention


class DenseBlock(nn.Module):
    """Five dilated convolutions, each fed by all before it, a 1x1 convolution, and the input added (DRDB)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        widths = [width + i * growth for i in range(5)]
        self.layers = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=2, dilation=2) for w in widths)
        self.join = nn.Conv2d(width + 5 * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,h,w]."""
        grown = [x]
        for layer in self.layers:
            grown.append(F.relu(layer(torch.cat(grown, 1))))
        return x + F.relu(self.join(torch.cat(grown, 1)))


class FusionNet(nn.Module):
    """Infrared and visible luminance, and semantics -> fused luminance, unclamped.

    width, growth, heads    C, the dense blocks' growth, attention heads
    fold        r: side of the pixel blocks that are folded into channels
    semantic    channels of S_1 and S_2
    native      semantics stay on their own grid inside the attention (False: upsampled first, as released)
    anchor      one of `ANCHORS`: what the network says (at first: nothing) is added to that of the pair, instead of a
                PReLU at the end. Not the paper's; it saves most of a short budget. "none": the paper's.
    attention   further arguments of `HierarchicalAttention`; one module serves both depths, as released
    """

    def __init__(
        self,
        width: int = 64,
        growth: int = 32,
        heads: int = 8,
        fold: int = 1,
        semantic: Sequence[int] = (64, 128),
        native: bool = True,
        anchor: str = "none",
        **attention,
    ) -> None:
        super().__init__()
        self.fold, self.native, self.anchor = fold, native, anchor
        self.stems = nn.ModuleList(_conv(fold**2, width) for _ in range(2))
        self.early = nn.ModuleList(DenseBlock(width, growth) for _ in range(2))
        self.late = nn.ModuleList(DenseBlock(width, growth) for _ in range(2))
        self.enter = nn.ModuleList(nn.Conv2d(c, width, 1) for c in semantic)
        self.unknown = nn.Parameter(torch.zeros(2, width))  # semantics before there is a segmentation network
        self.attention = HierarchicalAttention(width, heads, **attention)
        self.head = nn.Sequential(_conv(2 * width, width), _conv(width, width // 2))
        self.last = nn.Conv2d(width // 2, fold**2, 3, padding=1)
        self.activation = nn.PReLU() if anchor == "none" else None
        if self.activation is None:
            nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, infrared: Tensor, visible: Tensor, semantics: Sequence[Tensor] | None = None) -> Tensor:
        """infrared and visible luminance [B,1,H,W] in 0..1, semantics (S_1, S_2) or None -> [B,1,H,W]."""
        pair = [stem(F.pixel_unshuffle(x, self.fold)) for stem, x in zip(self.stems, (infrared, visible), strict=True)]
        for depth, blocks in enumerate((self.early, self.late)):
            pair = [block(x) for block, x in zip(blocks, pair, strict=True)]
            pair = self.attention(*pair, self._semantic(depth, semantics, pair[0]))
        out = F.pixel_shuffle(self.last(self.head(torch.cat(pair, 1))), self.fold)
        return self.activation(out) if self.anchor == "none" else out + ANCHORS[self.anchor](infrared, visible)

    def _semantic(self, depth: int, semantics: Sequence[Tensor] | None, like: Tensor) -> Tensor:
        """[B,C,h',w']: the 1x1 convolution comes before the upsampling, with which it commutes."""
        if semantics is None:
            return self.unknown[depth][None, :, None, None].expand_as(like)
        entered = self.enter[depth](semantics[depth])
        if self.native:
            return entered
        return F.interpolate(entered, like.shape[2:], mode="bilinear", align_corners=False)


def _conv(source: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(source, target, 3, padding=1), nn.PReLU())
